"""Damage everything that a user can give, and see what becomes of it.

Every input is made from a good one and a seed, so that ``--only AREA NUMBER`` makes it again. Its
outcome is one of: right (Hugging Face's numbers, or the undamaged ones), clear (an error of this
project's), traceback (any other error, or a crash), hang (more than 20 s), silent (other numbers,
or a loss that nobody speaks of). The last three are faults, and the exit code says so.

    python scripts/fuzz.py [--inputs 2100] [--seed 0] [--workers 2] [--only AREA NUMBER]
"""

import argparse
import json
import queue
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

OUTCOMES = ("right", "clear", "traceback", "hang", "silent")
FAULTS = OUTCOMES[2:]
LIMIT_S = 20
"""Of one input; a process that does not answer the alarm is killed at three times this."""
BATCH = 40
"""Inputs of one process: what one of them breaks, others do not suffer from."""


class Hang(BaseException):
    """An input that took too long; no handler of errors takes it for one."""


def attempt(area: Any, number: int, seed: int, folder: Path) -> dict[str, Any]:
    """The outcome of one input."""
    from hooked_alm.errors import HookedALMError

    rng = random.Random(f"{seed}/{type(area).__name__}/{number}")
    told = area.damage(folder, rng)
    try:
        outcome, error = ("right" if area.use(folder) else "silent"), ""
    except HookedALMError as found:
        outcome, error = "clear", str(found)
    except Hang:
        outcome, error = "hang", traceback.format_exc(limit=-4)
    except BaseException as found:
        outcome, error = "traceback", "".join(traceback.format_exception(found, limit=-4))
    return {"number": number, "told": told, "outcome": outcome, "error": error[-1500:]}


def work(name: str, numbers: list[int], seed: int) -> None:
    """Attempt some inputs of an area, and print a line of JSON for each."""
    import torch
    import transformers
    from fuzz_areas import AREAS

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")

    def too_long(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        area = AREAS[name][0](root)
        print(json.dumps({"ready": True}), flush=True)
        for number in numbers:
            print(json.dumps({"began": number}), flush=True)
            signal.alarm(LIMIT_S)
            try:
                result = attempt(area, number, seed, root / f"input{number}")
            except Hang:
                result = {"number": number, "told": "?", "outcome": "hang", "error": ""}
            signal.alarm(0)
            print(json.dumps(result), flush=True)


def batch(name: str, numbers: list[int], seed: int) -> list[dict[str, Any]]:
    """Outcomes of some inputs, from processes of their own: a crash costs one input."""
    results, left = [], numbers
    while left:
        command = [sys.executable, __file__, "--work", name, json.dumps(left), "--seed", str(seed)]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="replace",
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        lines: queue.Queue[str] = queue.Queue()
        said: list[str] = []
        readers = [
            threading.Thread(target=lambda p=process, q=lines: [q.put(x) for x in (*p.stdout, "")]),
            threading.Thread(target=lambda p=process, s=said: s.extend(p.stderr)),
        ]
        for reader in readers:
            reader.start()
        began, is_ready, outcome = left[0], False, "traceback"
        while True:
            try:
                line = lines.get(timeout=3 * LIMIT_S if is_ready else 300)
            except queue.Empty:
                process.kill()
                outcome = "hang"
                break
            if not line:
                break
            if not line.startswith("{"):  # a library prints
                continue
            found = json.loads(line)
            is_ready |= "ready" in found
            began = found.get("began", began)
            if "outcome" in found:
                results.append(found)
        process.wait()
        for reader in readers:
            reader.join()
        if not is_ready:
            raise RuntimeError(f"{name}: no input was made.\n{''.join(said)[-3000:]}")
        done = {one["number"] for one in results}
        if process.returncode and began not in done:
            error = f"exit status {process.returncode}\n{''.join(said)[-600:]}"
            results.append({"number": began, "told": "?", "outcome": outcome, "error": error})
            done.add(began)
        left = [number for number in left if number not in done]
    return results


def main() -> None:
    """Parse arguments, deal out the inputs, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=2100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs=2, metavar=("AREA", "NUMBER"))
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work[0], json.loads(options.work[1]), options.seed)
        return
    if options.only:
        (found,) = batch(options.only[0], [int(options.only[1])], options.seed)
        print(found["told"], found["outcome"], found["error"], sep="\n")
        sys.exit(found["outcome"] in FAULTS)
    from fuzz_areas import AREAS

    start, shares = time.monotonic(), {name: share for name, (_, share) in AREAS.items()}
    counts = {n: round(options.inputs * s / sum(shares.values())) for n, s in shares.items()}
    todo = [
        (name, list(range(first, min(first + BATCH, n))), options.seed)
        for first in range(0, max(counts.values()), BATCH)
        for name, n in counts.items()
        if first < n
    ]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in counts}
    with ThreadPoolExecutor(options.workers) as pool:
        for (name, *_), some in zip(todo, pool.map(lambda job: batch(*job), todo), strict=True):
            found[name] += some
    sys.exit(report(found, time.monotonic() - start))


def report(found: dict[str, list[dict[str, Any]]], seconds: float) -> bool:
    """Print every fault and the table; whether there is any."""
    faults = [(name, one) for name, some in found.items() for one in some
              if one["outcome"] in FAULTS]  # fmt: skip
    for name, one in faults:
        print(f"--only {name} {one['number']}: {one['outcome']}: {one['told']}\n{one['error']}\n")
    print("area       tried " + " ".join(f"{name:>9}" for name in OUTCOMES))
    total: Counter[str] = Counter()
    for name, some in found.items():
        count = Counter(one["outcome"] for one in some)
        total += count
        print(f"{name:<10} {len(some):>5} " + " ".join(f"{count[o]:>9}" for o in OUTCOMES))
    print(f"{'all':<10} {total.total():>5} " + " ".join(f"{total[o]:>9}" for o in OUTCOMES))
    print(f"{seconds / 60:.1f} minutes")
    return bool(faults)


if __name__ == "__main__":
    main()
