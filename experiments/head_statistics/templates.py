"""Prompt templates of ``head_statistics``, by name, and where a prompt ends and its answer begins.

A template is a function of a question that returns the prompt::

    @register_template("my_template")
    def my_template(question: Question, examples: Sequence[Question]) -> str: ...

It ends with the last word before the answer, and no white space: the space belongs to the answer
(" A"), because tokenizers merge it with what follows. ``form="seed"`` registers a seed document's
literal text beside the corrected one, and there the prompt ends as the seed's did.

Source: seed document 004 (``arc_mcq_v1``, ``build_sft_example``); methods cards M-004-6, M-004-7;
defects C35, C36.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from hooked_alm.errors import InputError

from .items import Question
from .settings import Form

Template = Callable[[Question, Sequence[Question]], str]
IGNORED = -100
"""Label of a token that the loss leaves out, as transformers has it."""
_TEMPLATES: dict[tuple[str, Form], Template] = {}


def register_template(name: str, *, form: Form = "corrected") -> Callable[[Template], Template]:
    """Decorator that makes a template known by name.

    Raises:
        InputError: the name is taken.
    """

    def register(template: Template) -> Template:
        if (name, form) in _TEMPLATES:
            raise InputError(f"registering template {name!r} ({form}): there is one already.")
        _TEMPLATES[name, form] = template
        return template

    return register


def find_template(name: str, form: Form) -> Template:
    """A template by name.

    Raises:
        InputError: there is none of that name, or none in that form.
    """
    if (name, form) not in _TEMPLATES:
        known = ", ".join(f"{n} ({f})" for n, f in sorted(_TEMPLATES))
        raise InputError(
            f"looking up template_name {name!r} with template_form {form!r}: expected one of "
            f"{known}. Others are made known by register_template, in the program that starts the "
            "run."
        )
    return _TEMPLATES[name, form]


def prompt_and_target(
    question: Question, examples: Sequence[Question], name: str, form: Form
) -> tuple[str, str]:
    """The prompt, and the answer that continues it.

    Raises:
        InputError: a corrected template's prompt ends with white space (C35).
    """
    prompt = find_template(name, form)(question, examples)
    if form == "seed":
        return prompt, question.answer
    if prompt != prompt.rstrip():
        raise InputError(
            f"template {name!r}: the prompt ends with {prompt[-1]!r}, expected no white space at "
            "the end. Leave it to the answer."
        )
    return prompt, f" {question.answer}"


def sft_labels(
    tokenizer: Any,
    prompt: str,
    target: str,
    *,
    masked_by: Literal["offsets", "token_count"] = "offsets",
) -> tuple[list[int], list[int]]:
    """Ids of prompt and answer, and labels that leave the prompt out.

    Args:
        tokenizer: a fast one.
        prompt: as a template makes it.
        target: the answer, with the space before it.
        masked_by: where a token ends in the text; or, as the seed did, by how many tokens the
            prompt has when it is tokenised alone, which is wrong where tokens merge (C35).

    Raises:
        InputError: a token reaches across the border, so that the labels would not be the answer.
    """
    both = tokenizer(prompt + target, return_offsets_mapping=True)
    ids, offsets = both["input_ids"], both["offset_mapping"]
    if masked_by == "token_count":
        n_prompt = len(tokenizer(prompt)["input_ids"])
        return ids, [IGNORED] * n_prompt + ids[n_prompt:]
    labels = [
        token if stop > len(prompt) else IGNORED
        for token, (_, stop) in zip(ids, offsets, strict=True)
    ]
    learned = tokenizer.decode([token for token in labels if token != IGNORED])
    # Sentencepiece drops the space at the start of a text.
    if learned not in (target, target.lstrip()):
        raise InputError(
            f"masking a prompt that ends {prompt[-12:]!r}: its labels read {learned!r}, expected "
            f"{target!r}. A token reaches across the border: end the prompt without white space."
        )
    return ids, labels


def is_merged(tokenizer: Any, prompt: str, target: str) -> bool:
    """Whether the answer changes the prompt's own tokens, so that its last one predicts nothing."""
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return tokenizer(prompt + target, add_special_tokens=False)["input_ids"][: len(alone)] != alone


def answer_ids(tokenizer: Any, prompt: str, target: str) -> list[int]:
    """Ids of the answer where it continues the prompt, with the space that it may be one with."""
    alone, both = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + target)
    )
    shared = 0
    while shared < min(len(alone), len(both)) and alone[shared] == both[shared]:
        shared += 1
    return list(both[shared:])


def letter_list(letters: Sequence[str]) -> str:
    """``A, B, C, or D``."""
    return f"{', '.join(letters[:-1])}, or {letters[-1]}"


_INSTRUCTION = """You are a careful reasoner. Read the question and choose the single best answer \
from the options.
Think step-by-step privately, but do not reveal your reasoning.
Return only the letter of the correct option ({}).

"""


def _ask(question: Question) -> str:
    options = "\n".join(
        f"{letter}. {text}"
        for letter, text in zip(question.option_labels, question.option_texts, strict=True)
    )
    return f"Question: {question.question}\nOptions:\n{options}\n\nAnswer:"


@register_template("arc_mcq_v1")
def arc_mcq_v1(question: Question, examples: Sequence[Question] = ()) -> str:
    """The seed's prompt, with the letters of this question, and no space at its end."""
    letters = max((question, *examples), key=lambda one: len(one.option_labels)).option_labels
    solved = "".join(f"{_ask(one)} {one.answer}\n\n" for one in examples)
    return _INSTRUCTION.format(letter_list(letters)) + solved + _ask(question)


@register_template("arc_mcq_v1", form="seed")
def seed_arc_mcq_v1(question: Question, examples: Sequence[Question] = ()) -> str:
    """The seed's prompt to the letter."""
    solved = "".join(f"{_ask(one)} {one.answer}\n\n" for one in examples)
    return _INSTRUCTION.format(letter_list("ABCD")) + solved + _ask(question) + " "
