"""Questions -> the prompts that one model reads, and batches of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hooked_alm import HookedALM
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput

from ..materials.clip_table import collect
from .items import Question
from .settings import HeadStatisticsConfig
from .templates import find_template, is_merged, prompt_and_target


@dataclass(frozen=True, kw_only=True)
class QuestionInput:
    """A question as a model reads it."""

    question: Question
    prompt: str
    target: str
    """The answer, as it continues the prompt."""
    ids: tuple[int, ...]
    """Empty under a chat template, which is rendered again for each batch."""
    n_tokens: int
    is_cut: bool
    is_merged: bool
    """The prompt's last token is another one when the answer follows (C35)."""

    def described(self) -> dict[str, Any]:
        """The seed's dictionary of an item, as JSON."""
        return {
            "id": self.question.id,
            "prompt_text": self.prompt,
            "answer_letter": self.question.answer,
            "option_labels": list(self.question.option_labels),
            "target_text": self.target,
            "meta": self.question.meta,
            "audio": [path.name for path in self.question.audio],
            "n_tokens": self.n_tokens,
            "is_cut": self.is_cut,
            "is_merged": self.is_merged,
        }


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
        find_template(config.template_name, config.template_form)
        if self.tokenizer is None:
            raise InputError(
                f"making prompts for {config.model!r}: its folder has no tokenizer. Add its files."
            )
        self.examples, rest = questions[: config.few_shot], questions[config.few_shot :]
        self.questions = list(rest if config.max_samples < 0 else rest[: config.max_samples])
        if not self.questions:
            raise InputError(
                f"taking {config.few_shot} of {len(questions)} questions as solved examples: none "
                "is left to ask. Set few_shot lower."
            )
        if heard := [one.where for one in self.examples if one.audio]:
            raise InputError(
                f"few_shot: {', '.join(heard)} has audio, which no example in a prompt can have. "
                "Set few_shot=0, or put questions without audio first."
            )
        with_audio = [one.where for one in self.questions if one.audio]
        self.format = config.prompt_format
        if self.format == "auto":
            self.format = "chat" if with_audio else "raw"
        self._check_format(with_audio)

    def _check_format(self, with_audio: list[str]) -> None:
        if self.format == "raw" and with_audio:
            raise InputError(
                f"prompt_format raw: {with_audio[0]} has audio, which needs a chat template. Set "
                "prompt_format=chat."
            )
        if self.format == "raw":
            return
        if self.model.prompts is None:
            raise InputError(
                f"prompt_format chat for {self.config.model!r}: it has no audio front-end, or its "
                "folder no processor files. Give an audio model with both, or items without audio."
            )
        if self.config.template_form == "seed":
            raise InputError(
                "prompt_format chat: the seed's template ends a raw text with a space, which a "
                "chat template has no place for. Set template_form=corrected."
            )

    def items(self) -> tuple[list[QuestionInput], list[dict[str, Any]]]:
        """Every question that fits, and those that do not, with the reason.

        Raises:
            InputError: all questions that this model cannot read, by line and field.
        """
        made = collect(
            f"making prompts for {self.config.model}",
            self._item,
            self.questions,
            lambda one: one.where,
        )
        kept = [item for item in made if item.n_tokens <= self.limit]
        skipped = [
            {
                "id": item.question.id,
                "where": item.question.where,
                "reason": f"{item.n_tokens} positions, {self.over}",
            }
            for item in made
            if item.n_tokens > self.limit
        ]
        if not kept:
            raise InputError(
                f"making prompts: all {len(made)} are too long: the shortest has "
                f"{min(i.n_tokens for i in made)} positions, {self.over}. Set {self.cure}, or give "
                "shorter questions."
            )
        return kept, skipped

    def batch(self, items: Sequence[QuestionInput]) -> ALMInput:
        """Some items as one left-padded batch."""
        if self.format == "chat":
            return self.model.prepare(
                [[str(path) for path in item.question.audio] for item in items],
                [item.prompt for item in items],
            )
        width = max(len(item.ids) for item in items)
        tokenizer = self.tokenizer
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        pad = next(token for token in known if token is not None)
        padded = [[pad] * (width - len(item.ids)) + list(item.ids) for item in items]
        mask = [[0] * (width - len(item.ids)) + [1] * len(item.ids) for item in items]
        return self.model.encode(input_ids=torch.tensor(padded), attention_mask=torch.tensor(mask))

    def _item(self, question: Question) -> QuestionInput:
        config = self.config
        prompt, target = prompt_and_target(
            question, self.examples, config.template_name, config.template_form
        )
        ids: tuple[int, ...] = ()
        merged = False
        n_whole = 0
        if self.format == "raw":
            merged = is_merged(self.tokenizer, prompt, target)
            whole = self.tokenizer(prompt, return_special_tokens_mask=True)
            n_whole = len(whole["input_ids"])
            ids = tuple(self._cut(whole["input_ids"], whole["special_tokens_mask"]))
        else:
            target = question.answer  # it begins a turn of its own
        item = QuestionInput(
            question=question, prompt=prompt, target=target, ids=ids, n_tokens=len(ids),
            is_cut=len(ids) < n_whole, is_merged=merged,
        )  # fmt: skip
        try:
            n_tokens = self.batch([item]).shape[1]
        except InputError as error:
            raise InputError(f"{'audio' if question.audio else 'question'}: {error}") from error
        if self.format == "chat" and n_tokens > self.limit and config.overflow != "skip":
            raise InputError(
                f"{n_tokens} positions, {self.over}: a chat prompt cannot be cut. Set "
                f"overflow=skip, or {self.cure}"
            )
        return QuestionInput(**{**vars(item), "n_tokens": n_tokens})

    def _cut(self, ids: list[int], is_special: list[int]) -> list[int]:
        n = self.limit
        if len(ids) <= n or self.config.overflow == "skip":
            return ids
        if self.config.overflow == "right":
            return ids[:n]
        # What a tokenizer puts first, such as <|begin_of_text|>, is no part of the text.
        first = is_special.index(0) if 0 in is_special else 0
        return [*ids[:first], *ids[first:][-(n - first) :]] if n > first else ids[:n]
