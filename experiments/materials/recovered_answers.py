"""What answers, and words that are said, lose with other rows in the place of a point's own."""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_alm.inputs import ALMInput
from hooked_alm.methods.dictionary.splice import (
    RowEdit,
    feature_edit,
    reconstruction,
    splice_hooks,
)

from ..workbench.results import Row
from .clip_rows import ClipRows, HeldOutClips
from .dictionary_partners import Dictionaries
from .transcription import WORDS

Ablations = Mapping[str, RowEdit]
"""What takes a point's rows away, by name."""


@torch.no_grad()
def ablations(rows: ClipRows, split: HeldOutClips, point: str) -> Ablations:
    """The mean of the held-out rows, and zeros, in the place of rows."""
    n, total = 0, torch.zeros(())
    for part in rows.parts(split.held_out):
        found = rows.values(part)[point]
        n, total = n + len(found), total + found.float().sum(0)
    mean = total / n
    return {"mean": lambda x: mean.expand_as(x), "zero": torch.zeros_like}


@torch.no_grad()
def recovery_rows(
    rows: ClipRows, split: HeldOutClips, point: str, saes: Dictionaries, without: Ablations
) -> Iterator[Row]:
    """What the answer to each held-out clip loses, with other rows in the place of its own.

    KL divergence in nats of the next token at the readout, from the run as it is: with
    reconstructions, without the rows, and with features that are taken apart and left alone.
    """
    for part in rows.parts(split.held_out):
        x = rows.heard(part)
        clean = _readout(rows, x)

        def lost(edit: RowEdit, x: ALMInput = x, clean: Tensor = clean) -> list[float]:
            other = _readout(rows, x, {point: edit})
            kl = (clean.exp() * (clean - other)).sum(-1)
            found: list[float] = kl.tolist()
            return found

        plain = {f"kl_{name}": lost(edit) for name, edit in without.items()}
        for seed, sae in saes.items():
            by_clip = zip(
                part, lost(reconstruction(sae)), lost(feature_edit(sae, lambda f: f)), strict=True
            )
            for row, (clip, kl, kept) in enumerate(by_clip):
                yield {
                    **_of(rows, split, clip, point, seed), "kl": kl,
                    **{name: found[row] for name, found in plain.items()}, "kl_kept": kept,
                }  # fmt: skip


@torch.no_grad()
def word_rows(
    rows: ClipRows, split: HeldOutClips, point: str, saes: Dictionaries, without: Ablations
) -> Iterator[Row]:
    """Cross-entropy of the words that are said in each held-out clip, in nats a token.

    Of a Whisper, and of clips whose table has their words: every token behind those before it
    (teacher forcing), as many as the decoder has positions for.
    """
    for clip in split.held_out:
        x, tokens = _said(rows, clip)
        if not tokens:
            continue

        def ce(edit: RowEdit | None = None, x: ALMInput = x, tokens: list[int] = tokens) -> float:
            logits = _logits(rows, x, {point: edit} if edit else {})[0, -len(tokens) - 1 : -1]
            of_words = logits.double().log_softmax(-1)[range(len(tokens)), tokens]
            return -float(of_words.mean())

        plain = {"ce_clean": ce(), **{f"ce_{name}": ce(edit) for name, edit in without.items()}}
        for seed, sae in saes.items():
            yield {
                **_of(rows, split, clip, point, seed), "n_tokens": len(tokens),
                "ce": ce(reconstruction(sae)), **plain,
                "ce_kept": ce(feature_edit(sae, lambda f: f)),
            }  # fmt: skip


def _of(rows: ClipRows, split: HeldOutClips, clip: int, point: str, seed: int) -> Row:
    named = {"clip": rows.clips[clip].name, "group": split.groups[clip]}
    return {**named, "point": point, "seed": seed}


def _said(rows: ClipRows, clip: int) -> tuple[ALMInput, list[int]]:
    """A clip's prompt with its words behind, and their tokens; none where nothing is written."""
    model, x, cells = rows.model, rows.heard([clip]), rows.clips[clip].cells
    text = next((cells[name] for name in WORDS if cells.get(name)), "")
    if model.audio is None or not model.audio.is_memory or not text:
        return x, []
    tokens = model.tokenizer(f" {text}", add_special_tokens=False).input_ids
    tokens = tokens[: model.cfg.n_ctx - x.shape[1]]
    return x.answered(torch.tensor([tokens], device=x.device)), tokens


def _logits(
    rows: ClipRows, x: ALMInput, edits: Mapping[str, RowEdit]
) -> Float[Tensor, "batch pos vocab"]:
    hooks = splice_hooks(rows.model, x, edits, rows.config.spans)
    found: Tensor = rows.model.run_with_hooks(x, fwd_hooks=hooks)
    return found


def _readout(
    rows: ClipRows, x: ALMInput, edits: Mapping[str, RowEdit] | None = None
) -> Float[Tensor, "batch vocab"]:
    """Log-probabilities of the next token at each prompt's readout."""
    logits = _logits(rows, x, edits or {})
    at = [x.spans.positions("readout", row)[-1] for row in range(len(x))]
    chosen: Tensor = logits[torch.arange(len(x)), torch.tensor(at)]
    return chosen.double().log_softmax(-1)
