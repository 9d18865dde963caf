"""Questions -> the prompts that one model reads, by templates that have names.

A template is a function of a question that returns the prompt::

    @register_template("my_template")
    def my_template(question: Question, examples: Sequence[Question]) -> str: ...

It ends with the last word before the answer, and no white space: the space belongs to the answer
(" A"), because tokenizers merge it with what follows. ``form="seed"`` registers a seed document's
literal text beside the corrected one, and there the prompt ends as the seed's did.

Source: seed 004 (``arc_mcq_v1``, ``build_sft_example``); M-004-6, M-004-7;
defects C35, C36.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from hooked_alm import HookedALM
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput

from ..materials.records import collect, raise_all
from .items import N_OPTIONS, Question
from .settings import Form, HeadStatisticsConfig

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


def find_template(
    name: str, form: Form
) -> Callable[[Question, Sequence[Question]], tuple[str, str]]:
    """Function of a question and solved examples: the prompt, and the answer that continues it.

    Raises:
        InputError: there is no such template; from the function, a corrected template's prompt ends
            with white space (C35).
    """
    if (name, form) not in _TEMPLATES:
        known = ", ".join(f"{n} ({f})" for n, f in sorted(_TEMPLATES))
        raise InputError(
            f"looking up template_name {name!r} with template_form {form!r}: expected one of "
            f"{known}. Others are made known by register_template, in the program that starts the "
            "run."
        )

    return partial(_prompt_and_target, name, form)


def _prompt_and_target(
    name: str, form: Form, question: Question, examples: Sequence[Question]
) -> tuple[str, str]:
    prompt = _TEMPLATES[name, form](question, examples)
    if form == "seed":
        return prompt, question.answer
    if prompt != prompt.rstrip():
        raise InputError(
            f"template {name!r}: the prompt ends with {prompt[-1]!r}, expected no white space "
            "at the end. Leave it to the answer."
        )
    return prompt, f" {question.answer}"


_INSTRUCTION = """You are a careful reasoner. Read the question and choose the single best answer \
from the options.
Think step-by-step privately, but do not reveal your reasoning.
Return only the letter of the correct option ({}).

"""


def _arc_mcq(question: Question, examples: Sequence[Question], letters: Sequence[str]) -> str:
    def ask(one: Question) -> str:
        lines = (
            f"{a}. {text}" for a, text in zip(one.option_labels, one.option_texts, strict=True)
        )
        return f"Question: {one.question}\nOptions:\n" + "\n".join(lines) + "\n\nAnswer:"

    named = f"{', '.join(letters[:-1])}, or {letters[-1]}"
    solved = "".join(f"{ask(one)} {one.answer}\n\n" for one in examples)
    return _INSTRUCTION.format(named) + solved + ask(question)


@register_template("arc_mcq_v1")
def arc_mcq_v1(question: Question, examples: Sequence[Question] = ()) -> str:
    """The seed's prompt, with the letters of this question, and no space at its end."""
    most = max((question, *examples), key=lambda one: len(one.option_labels))
    return _arc_mcq(question, examples, most.option_labels)


@register_template("arc_mcq_v1", form="seed")
def seed_arc_mcq_v1(question: Question, examples: Sequence[Question] = ()) -> str:
    """The seed's prompt to the letter."""
    return _arc_mcq(question, examples, "ABCD") + " "


def continuation(tokenizer: Any, prompt: str, target: str) -> tuple[list[int], bool]:
    """Ids of the answer after the prompt, and whether it merges with the prompt's own last token.

    Where it does, that token predicts nothing, and the ids begin with one that holds both.
    """
    alone, both = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + target)
    )
    same = takewhile(lambda pair: pair[0] == pair[1], zip(alone, both, strict=False))
    n_shared = len(list(same))
    return list(both[n_shared:]), n_shared < len(alone)


def sft_labels(tokenizer: Any, prompt: str, target: str) -> tuple[list[int], list[int]]:
    """Ids of prompt and answer, and labels that leave the prompt out; by a fast tokenizer.

    What is left out follows from where tokens end in the text. The seed counted the tokens of the
    prompt alone, which is wrong where tokens merge (C35).

    Raises:
        InputError: a token reaches across the border, so that the labels would not be the answer.
    """
    both = tokenizer(prompt + target, return_offsets_mapping=True)
    ids, offsets = both["input_ids"], both["offset_mapping"]
    labels = [i if end > len(prompt) else IGNORED for i, (_, end) in zip(ids, offsets, strict=True)]
    learned = tokenizer.decode([label for label in labels if label != IGNORED])
    # Sentencepiece drops the space at the start of a text.
    if learned not in (target, target.lstrip()):
        raise InputError(
            f"masking a prompt that ends {prompt[-12:]!r}: its labels read {learned!r}, expected "
            f"{target!r}. A token reaches across the border: end the prompt without white space."
        )
    return ids, labels


@dataclass(frozen=True, kw_only=True)
class QuestionInput:
    """A question as a model reads it."""

    question: Question
    prompt: str
    target: str
    """The answer, as it continues the prompt."""
    ids: tuple[int, ...] = ()
    """Empty under a chat template, which is rendered again for each batch."""
    n_tokens: int = 0
    is_cut: bool = False
    is_merged: bool = False
    """The prompt's last token is another one when the answer follows (C35)."""

    def described(self) -> dict[str, Any]:
        """The seed's dictionary of an item, as JSON."""
        asked = self.question
        return {
            "id": asked.id, "prompt_text": self.prompt, "answer_letter": asked.answer,
            "option_labels": list(asked.option_labels), "target_text": self.target,
            "meta": asked.meta, "audio": [path.name for path in asked.audio],
            "n_tokens": self.n_tokens, "is_cut": self.is_cut, "is_merged": self.is_merged,
        }  # fmt: skip


class Prompts:
    """Makes one model's prompts, all in one format."""

    def __init__(
        self, model: HookedALM, config: HeadStatisticsConfig, questions: Sequence[Question]
    ) -> None:
        """Set the first questions aside as solved examples, and settle on a format.

        Raises:
            InputError: a model that cannot read the format, or settings that do not fit the items.
        """
        self.model, self.config, self.tokenizer = model, config, model.tokenizer
        n_ctx = model.cfg.n_ctx
        self.limit, self.over, self.cure = min(
            (config.max_length, f"over max_length {config.max_length}", "max_length higher"),
            (n_ctx, f"over the {n_ctx} that the model was made for", "few_shot lower"),
        )
        self.template = find_template(config.template_name, config.template_form)
        sizes = [(one, len(one.option_labels)) for one in questions]
        self.unusable = [(one, f"{n} options") for one, n in sizes if n not in N_OPTIONS]
        usable = [one for one, n in sizes if n in N_OPTIONS]
        self.examples, rest = usable[: config.few_shot], usable[config.few_shot :]
        self.questions = rest if config.max_samples < 0 else rest[: config.max_samples]
        heard = [one.where for one in self.questions if one.audio]
        self.is_chat = {"auto": bool(heard), "raw": False, "chat": True}[config.prompt_format]
        solved = ", ".join(one.where for one in self.examples if one.audio)
        faults = {
            "its folder has no tokenizer. Add its files.": self.tokenizer is None,
            f"taking {config.few_shot} of {len(usable)} questions as solved examples: none is "
            "left to ask. Set few_shot lower.": not self.questions,
            f"few_shot: {solved} has audio, which no example in a prompt can have. Set "
            "few_shot=0, or put questions without audio first.": bool(solved),
            f"prompt_format raw: {', '.join(heard[:1])} has audio, which needs a chat template. "
            "Set prompt_format=chat.": bool(heard) and not self.is_chat,
            "prompt_format chat: the model has no audio front-end, or its folder no processor "
            "files. Give an audio model with both, or items without audio.": self.is_chat
            and model.prompts is None,
            "prompt_format chat: the seed's template ends a raw text with a space, which a chat "
            "template has no place for. Set template_form=corrected.": self.is_chat
            and config.template_form == "seed",
        }
        self.doing = f"making prompts for {config.model}"
        raise_all(self.doing, [fault for fault, holds in faults.items() if holds])

    def items(self) -> tuple[list[QuestionInput], list[dict[str, Any]]]:
        """Every question that fits, and those that do not, with the reason.

        Raises:
            InputError: all questions that this model cannot read, by line and field.
        """
        made = collect(self.doing, self._item, self.questions, lambda one: one.where)
        kept = [one for one in made if one.n_tokens <= self.limit]
        if not kept:
            raise InputError(
                f"{self.doing}: all {len(made)} are too long: the shortest has "
                f"{min(i.n_tokens for i in made)} positions, {self.over}. Set {self.cure}, or give "
                "shorter questions."
            )
        left_out = self.unusable + [
            (one.question, f"{one.n_tokens} positions, {self.over}")
            for one in made if one.n_tokens > self.limit
        ]  # fmt: skip
        return kept, [{"id": one.id, "where": one.where, "reason": why} for one, why in left_out]

    def batch(self, items: Sequence[QuestionInput]) -> ALMInput:
        """Some items as one left-padded batch."""
        if self.is_chat:
            return ALMInput.joined([
                self.model.prepare([[str(path) for path in item.question.audio]], item.prompt)
                for item in items
            ])  # fmt: skip
        rows = [torch.tensor(item.ids) for item in items]
        # Which token pads does not matter: the mask hides it.
        ids, mask = (
            pad_sequence(some, batch_first=True, padding_side="left")
            for some in (rows, [torch.ones_like(row) for row in rows])
        )
        return self.model.encode(input_ids=ids, attention_mask=mask)

    def _item(self, question: Question) -> QuestionInput:
        prompt, target = self.template(question, self.examples)
        if self.is_chat:  # the answer begins a turn of its own
            item = QuestionInput(question=question, prompt=prompt, target=question.answer)
        else:
            whole = self.tokenizer(prompt, return_special_tokens_mask=True)
            ids = tuple(self._cut(whole["input_ids"], whole["special_tokens_mask"]))
            item = QuestionInput(
                question=question, prompt=prompt, target=target, ids=ids,
                is_cut=len(ids) < len(whole["input_ids"]),
                is_merged=continuation(self.tokenizer, prompt, target)[1],
            )  # fmt: skip
        try:
            item = replace(item, n_tokens=self.batch([item]).shape[1])
        except InputError as error:
            raise InputError(f"{'audio' if question.audio else 'question'}: {error}") from error
        if self.is_chat and item.n_tokens > self.limit and self.config.overflow != "skip":
            raise InputError(
                f"{item.n_tokens} positions, {self.over}: a chat prompt cannot be cut. Set "
                f"overflow=skip, or {self.cure}"
            )
        return item

    def _cut(self, ids: list[int], is_special: list[int]) -> list[int]:
        n = self.limit
        if len(ids) <= n or self.config.overflow == "skip":
            return ids
        # What a tokenizer puts first, such as <|begin_of_text|>, is no part of the text.
        first = is_special.index(0) if 0 in is_special else 0
        if self.config.overflow == "right" or n <= first:
            return ids[:n]
        return [*ids[:first], *ids[first - n :]]
