"""Damages for `fuzz`: of JSON and YAML by their structure, of binary files by their bytes."""

import json
import random
import struct
from collections.abc import Callable
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 0.5, -0.5, 1e-30, 1e30, 10**9, 10**40, float("nan"),
    float("inf"), float("-inf"), "", " ", "0", "7", "no", "../x", "/etc/passwd", "a\x00b",
    "\x1b[2J", "\u202e", "\ud800", "é你", "x" * 5000, [], {}, [None], [0, 1], {"a": 1}, [[]],
    "auto", "eager",
)  # fmt: skip
"""Values that a field may have by mistake."""


def of_json(text: str, rng: random.Random) -> tuple[str, str]:
    """A JSON text with a field changed, or with its text broken; and what was done."""
    if rng.random() < 0.25:
        return of_text(text, rng)
    value = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value, done = _changed(value, rng)
    return json.dumps(value, ensure_ascii=rng.random() < 0.9, default=str), done


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    below = value.items() if isinstance(value, dict) else ()
    below = enumerate(value[:20]) if isinstance(value, list) else below
    return [path, *(found for key, one in below for found in _paths(one, (*path, key)))]


def _changed(value: Any, rng: random.Random) -> tuple[Any, str]:
    path = rng.choice(_paths(value)[1:] or [()])
    if not path:
        odd = rng.choice(ODD)
        return odd, f"all = {odd!r:.40}"
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    where, key, old = ".".join(map(str, path)), path[-1], parent[path[-1]]
    how = rng.choice(("odd", "odd", "odd", "drop", "near", "more", "swap"))
    if how == "drop":
        del parent[key]
        return value, f"{where} dropped"
    if how == "more" and isinstance(parent, dict):
        parent[rng.choice((f"{key}_2", "", "x" * 300, "\u202e"))] = old
        return value, f"beside {where}, another"
    if how == "swap" and isinstance(parent, dict) and len(parent) > 1:
        other = rng.choice(sorted(parent, key=str))
        parent[key], parent[other] = parent[other], parent[key]
        return value, f"{where} and {other} exchanged"
    if how == "near" and isinstance(old, int | float) and not isinstance(old, bool):
        parent[key] = rng.choice((old + 1, old - 1, -old, old * 2, old / 2, str(old), [old]))
    elif how == "near" and isinstance(old, str):
        parent[key] = rng.choice((old.upper(), old + "x", old[:-1], old * 2, [old], None))
    else:
        parent[key] = rng.choice(ODD)
    return value, f"{where} = {parent[key]!r:.40}"


def of_text(text: str, rng: random.Random) -> tuple[str, str]:
    """A text cut, emptied, replaced, or with characters put in."""
    at = rng.randrange(len(text) + 1)
    junk = rng.choice(
        ("\x00", "\ufeff", "\x1b]0;x\x07", "}", '"', "[", ",", "\n", "\t", "{{", "{%")
    )
    texts = {
        "cut": text[:at],
        "emptied": "",
        f"{junk!r} put in": text[:at] + junk + text[at:],
        "a piece left out": text[:at] + text[at + rng.randrange(1, 40) :],
        "nested deeply": "[" * 30_000,
        "nested deeply, closed": "[" * 3000 + "]" * 3000,
        "doubled": text + text,
        "a byte order mark": "\ufeff" + text,
        "another JSON": rng.choice(("null", "[]", "{}", "3", '"x"', "NaN")),
    }
    done = rng.choice(sorted(texts))
    return texts[done], done


def of_bytes(data: bytes, rng: random.Random, header: int = 64) -> tuple[bytes, str]:
    """A file cut, lengthened, or with bytes changed, mostly at its beginning."""
    n = len(data)
    at = rng.choice((rng.randrange(n), rng.randrange(min(header, n))))
    how: dict[str, Callable[[], bytes]] = {
        "cut": lambda: data[: rng.choice((at, n // 2, n - 1, n * 9 // 10, 12, 4, 0))],
        "a byte changed": lambda: data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
        "a size changed": lambda: data[: at // 4 * 4] + struct.pack(
            "<I", rng.choice((0, 1, 1000, 2**31 - 1, 2**31, 2**32 - 1))
        ) + data[at // 4 * 4 + 4 :],
        "bytes left out": lambda: data[:at] + data[at + rng.randrange(1, 9) :],
        "bytes put in": lambda: data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:],
        "zeros": lambda: data[:at] + bytes(min(512, n - at)) + data[at + 512 :],
        "doubled": lambda: data + data,
        "junk behind": lambda: data + rng.randbytes(rng.choice((1, 3, 1000))),
    }  # fmt: skip
    done = rng.choice(sorted(how))
    return how[done](), f"{done} at {at}"


def of_file_bytes(text: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A text file that is no UTF-8, or another encoding of it."""
    kinds = {
        "UTF-16": text.decode("utf-8").encode("utf-16"),
        "a byte of Latin-1": text + b"\xe9",
        "half a character": text + "你".encode()[:2],
    }
    done = rng.choice(sorted(kinds))
    return kinds[done], done
