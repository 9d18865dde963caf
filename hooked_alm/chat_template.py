"""Chat templates, rendered as transformers renders them, within a budget of work.

A template is a program that comes with a checkpoint, and may loop for ever or write without end.
Its steps are counted, and the sizes of what it writes, joins, adds, multiplies and raises to
powers. What one filter, method or format makes of values within the budget is not counted.
"""

import operator
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import FrameType
from typing import Any

from .errors import InputError, any_failure

MAX_WORK = 10_000_000
"""Characters, items and bits of one rendering, steps included."""
STEP = 10
"""Work of a line. A chat of fifty messages takes some 20,000 lines."""
COMPILING = 5_000
"""Work for each character of a template, to compile it; measured: 830."""


def render_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    template: str | None,
    *,
    tools: Any = None,
    add_generation_prompt: bool = True,
) -> str:
    """Text of a chat, equal to the tokenizer's ``apply_chat_template``.

    Args:
        tokenizer: the tokenizer, whose special tokens the template may name.
        messages: the chat.
        template: chat template; None is the tokenizer's own.
        tools: JSON schemas of functions that the template may list.
        add_generation_prompt: end where the answer begins.

    Raises:
        InputError: the template fails, whatever the reason, or is too much work.
    """
    # The parts of transformers' `render_jinja_template`.
    from transformers.utils.chat_template_utils import _alias_reasoning_fields, _plain_template_data

    with any_failure(
        InputError,
        "rendering the chat template: it fails on these messages",
        "Give the roles and parts that it knows; if it is damaged, download it again.",
    ):
        source = tokenizer.get_chat_template(template, tools)
        given = _plain_template_data(
            {
                **tokenizer.special_tokens_map,
                "messages": [{k: v for k, v in m.items() if v is not None} for m in messages],
                "tools": tools,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
            }
        )
        given["messages"] = _alias_reasoning_fields(given["messages"])
        compiled = _compiled(source)
        with _counted_steps(MAX_WORK):
            return _join(compiled.generate(given))


@lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
    """A template in transformers' own sandbox, what makes something large counted."""
    from transformers.utils.chat_template_utils import _cached_compile_jinja_template

    sandbox = _cached_compile_jinja_template("").environment
    sandbox.intercepted_binops = frozenset(_OPERATORS)  # nor are they computed while it compiles
    sandbox.call_binop = _compute
    sandbox.concat = _join
    sandbox.globals["raise_exception"] = _refuse
    with _counted_steps(MAX_WORK + COMPILING * len(source)):  # filters of constants run already
        template = sandbox.from_string(source)
    template.root_render_func.__globals__["str_join"] = _join  # the operator ~
    return template


def _refuse(reason: object) -> None:
    raise InputError(
        f"rendering the chat template: it refuses these messages ({reason}). Give the roles and "
        "parts that it knows."
    )


class _Budget(threading.local):
    left = 0

    def spend(self, work: int) -> None:
        self.left -= work
        if self.left < 0:
            raise InputError(
                f"rendering the chat template: it takes more than {MAX_WORK // STEP} steps, or "
                f"writes more than {MAX_WORK} characters. If it is damaged, download it again; "
                "otherwise give fewer messages."
            )


_budget = _Budget()


@contextmanager
def _counted_steps(work: int) -> Iterator[None]:
    """Count the lines of templates and of jinja's functions, in this thread.

    A timer would interrupt the main thread only, and depend on the machine.
    """

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        name = frame.f_globals.get("__name__", "")  # a compiled template has none
        if not name.startswith("jinja2.") and frame.f_code.co_filename != "<template>":
            return None
        _budget.spend(STEP)
        return trace

    before, _budget.left = sys.gettrace(), work
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def _join(pieces: Iterable[Any]) -> str:
    found = []
    for piece in map(str, pieces):
        _budget.spend(len(piece))
        found.append(piece)
    return "".join(found)


def _size(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else len(value)


def _times(a: Any, b: Any) -> int:
    """Size of a product: repetitions add up, the bits of two numbers too."""
    if isinstance(a, int) == isinstance(b, int):
        return _size(a) + _size(b)
    return max(a * len(b) if isinstance(a, int) else len(a) * b, 0)


_OPERATORS: Mapping[str, tuple[Callable[[Any, Any], Any], Callable[[Any, Any], int]]] = {
    "+": (operator.add, lambda a, b: _size(a) + _size(b)),
    "*": (operator.mul, _times),
    "**": (operator.pow, lambda a, b: _size(a) * abs(b)),
}
"""Operator -> what it computes, and the size that comes of it."""


def _compute(context: Any, symbol: str, a: Any, b: Any) -> Any:
    compute, size = _OPERATORS[symbol]
    if not (isinstance(a, float) or isinstance(b, float)):
        _budget.spend(size(a, b))
    return compute(a, b)
