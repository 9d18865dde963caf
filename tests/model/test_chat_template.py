"""Chat templates: equal to transformers', and one error for whatever else they do."""

import sys
from typing import Any

import pytest

from hooked_alm import chat_template
from hooked_alm.chat_template import render_chat
from hooked_alm.errors import InputError
from tiny import build_processor

PROCESSOR = build_processor()
CHAT = [{"role": "user", "content": [{"type": "text", "text": "Who speaks?"}]}]
DOUBLING = "{% set ns = namespace(x='a') %}{% for i in range(60) %}DOUBLE{% endfor %}"
REFUSED = {
    "{{ raise_exception('only users') }}": r"refuses these messages \(only users\)",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "more than",
    "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}": "m",
    "{{ range(9)|slice(10**12)|list }}": "takes more than 50000 steps",
    "{% for i in range(10**12) %}{% endfor %}": "OverflowError: Range too big",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "RecursionError",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}": "RecursionError",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}": "RecursionError",
    "{{ 'a' * 10**10 }}": "writes more than 500000 characters",
    "{{ 9999999999 * [1] }}": "writes more than 500000 characters",
    "{{ 9 ** (9 ** 9) }}": "writes more than 500000 characters",
    DOUBLING.replace("DOUBLE", "{% set ns.x = ns.x ~ ns.x %}"): "writes more than",
    DOUBLING.replace("DOUBLE", "{% set ns.x = ns.x + ns.x %}"): "writes more than",
    DOUBLING.replace(
        "DOUBLE", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"
    ): "m",
    "{{ messages|nope }}": "TemplateAssertionError: No filter named 'nope'",
    "{% for %}": "TemplateSyntaxError",
    "{% break %}": "SyntaxError",
    "{{ messages[0].content.x.y }}": "UndefinedError",
    "{{ 1 + 'a' }}": "TypeError",
    "{{ 1 // 0 }}": "ZeroDivisionError",
    "{% include 'x' %}": "TypeError: no loader",
}
"""Template -> a part of the message."""


@pytest.mark.parametrize("template", REFUSED)
def test_a_template_that_fails_is_one_error(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_WORK", 500_000)
    tokenizer, before = PROCESSOR.tokenizer, sys.gettrace()
    with pytest.raises(InputError, match=f"rendering the chat template: .*{REFUSED[template]}"):
        render_chat(tokenizer, CHAT, template)
    assert sys.gettrace() is before


EQUAL: dict[str, dict[str, Any]] = {
    "{{ eos_token ~ pad_token ~ bos_token }}|{{ 'ab' * 3 + 'c' }}|{{ 2 ** 5 * 2.5 }}": {},
    "{% for m in messages %}{{ m|tojson }}{{ m.none is defined }}{% endfor %}": {},
    "{{ tools|tojson }}{% if not add_generation_prompt %}end{% endif %}": {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "add_generation_prompt": False,
    },
    "{% generation %}{{ messages[0].reasoning_content }}{% endgeneration %}": {},
}
"""Template -> options besides the messages."""


@pytest.mark.parametrize("template", EQUAL)
def test_equal_to_transformers(template: str) -> None:
    tokenizer = PROCESSOR.tokenizer
    chat = [*CHAT, {"role": "assistant", "content": "龘", "none": None, "thinking": "hm"}]
    ours = render_chat(tokenizer, chat, template, **EQUAL[template])
    options = {"add_generation_prompt": True, **EQUAL[template]}
    theirs = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, **options)
    assert ours == theirs


def test_a_long_chat_is_well_within_the_budget() -> None:
    processor = PROCESSOR
    chat = CHAT * 100
    ours = render_chat(processor.tokenizer, chat, processor.chat_template)
    assert ours == processor.tokenizer.apply_chat_template(
        chat, chat_template=processor.chat_template, tokenize=False, add_generation_prompt=True
    )
