"""Logit lens: final norm and unembedding on the residual stream at every depth (block S-1).

Depth k is the residual stream after k blocks: 0 are the embeddings, L feeds the final norm. The
states come from hook points, so that depth L is not normed twice as it is with Hugging Face's
``hidden_states[-1]``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ...errors import InputError
from ...hooks import Hook, HookPoint
from ...inputs import ALMInput
from ...model import HookedALM
from ..result import MethodResult

LensNorm = Literal["final", "none"]
Rows = Float[Tensor, "depth batch pos d_model"]


@runtime_checkable
class Lens(Protocol):
    """How a depth is read: rows are translated, normed or not, and unembedded."""

    @property
    def norm(self) -> LensNorm:
        """What rows pass between translation and unembedding."""
        ...

    @property
    def n_depths(self) -> int | None:
        """Depths of the model that it was trained for; None reads any model."""
        ...

    def translate(
        self, rows: Float[Tensor, "*rows d_model"], depth: int
    ) -> Float[Tensor, "*rows d_model"]:
        """Rows of one depth as the unembedding is to read them."""
        ...


@dataclass(frozen=True)
class LogitLens:
    """The lens that reads rows as they are.

    ``norm="none"`` leaves the final norm out; see ``unembed_rows``.
    """

    norm: LensNorm = "final"
    n_depths: None = None

    def translate(
        self, rows: Float[Tensor, "*rows d_model"], depth: int
    ) -> Float[Tensor, "*rows d_model"]:
        """The rows."""
        return rows


LOGIT_LENS = LogitLens()


def check_depths(lens: Lens, n_depths: int) -> None:
    """Refuses a lens that was trained for a model of another number of depths.

    Raises:
        InputError: it was.
    """
    if lens.n_depths not in (None, n_depths):
        raise InputError(
            f"reading residual rows: got {n_depths} depths, expected the {lens.n_depths} of the "
            "model that the lens was trained for. Give what `residual_rows` returns."
        )


def translated(lens: Lens, rows: Rows) -> Rows:
    """Residual rows of every depth 0..L, as a lens hands them to the unembedding.

    Raises:
        InputError: rows of another number of depths than the lens was trained for.
    """
    check_depths(lens, len(rows))
    return torch.stack([lens.translate(row, depth) for depth, row in enumerate(rows)])


def readout_positions(x: ALMInput) -> Int[Tensor, "batch 1"]:
    """The position of each row that predicts the first answer token."""
    return torch.tensor([[x.spans.positions("readout", row)[-1]] for row in range(len(x))])


class StreamReader:
    """Hooks that keep the residual stream at chosen positions while a model runs."""

    def __init__(
        self, model: HookedALM, x: ALMInput, positions: Int[Tensor, "batch pos"] | None = None
    ) -> None:
        """Holds nothing yet; see `residual_rows`."""
        model.refuse_encoder("reading the stream at every depth")
        where = readout_positions(x) if positions is None else positions
        self.model, self.device = model, x.device
        self.where, self.batch = where, torch.arange(len(x))[:, None]
        self._kept: list[Tensor] = []

    @property
    def hooks(self) -> list[Hook]:
        """Hooks for one forward."""
        return [(name, self._keep) for name in self.model.depth_names()]

    def rows(self) -> Rows:
        """What the forward has shown, of every depth 0..L."""
        return torch.stack(self._kept)

    def _keep(self, value: Tensor, hook: HookPoint) -> None:
        there = self.batch.to(value.device), self.where.to(value.device)
        self._kept.append(value[there].detach().to(self.device))


@torch.no_grad()
def residual_rows(
    model: HookedALM, x: ALMInput, positions: Int[Tensor, "batch pos"] | None = None
) -> Rows:
    """The residual stream at chosen positions of every depth 0..L, from one forward.

    Args:
        model: to run.
        x: prompts.
        positions: per row; None is the readout.
    """
    reader = StreamReader(model, x, positions)
    with model.hooks(fwd_hooks=reader.hooks):
        model(x, return_type=None)
    return reader.rows()


@torch.no_grad()
def unembed_rows(
    model: HookedALM,
    rows: Float[Tensor, "*rows d_model"],
    tokens: Sequence[int] | None = None,
    norm: LensNorm = "final",
) -> Float[Tensor, "*rows token"]:
    """Lens logits of residual rows, in fp32, over given tokens or the whole vocabulary.

    Args:
        model: the model whose final norm and unembedding are applied.
        rows: residual stream at any depth.
        tokens: only these rows of the unembedding are multiplied; None is all of them.
        norm: "none" leaves the final norm out. Then magnitudes follow the residual norm and signs
            can flip; it is here to reproduce work that did so (defect C6).

    Raises:
        InputError: an id that the vocabulary lacks.
    """
    size = model.head_unembed.out_features
    if wrong := [token for token in tokens or () if not 0 <= token < size]:
        raise InputError(
            f"reading the lens at tokens {wrong}: the vocabulary has ids 0 to {size - 1}."
        )
    weight = model.head_unembed.directions(tokens)
    return F.linear(normalised(model, rows, norm).to(weight.device), weight.float())


def normalised(
    model: HookedALM, rows: Float[Tensor, "*rows d_model"], norm: LensNorm = "final"
) -> Float[Tensor, "*rows d_model"]:
    """Rows as the unembedding of a lens reads them, in fp32: after the final norm, or without."""
    x = rows.float()
    if norm == "none":
        return x
    # Gradients may reach the rows (a lens is trained so), never the model.
    ln = model.head_norm
    scaled = ln.normalize(x) * ln.weight.detach().to(x)
    shift: Tensor | None = getattr(ln, "bias", None)
    return scaled if shift is None else scaled + shift.detach().to(x)


def logit_lens(
    model: HookedALM,
    x: ALMInput,
    tokens: Sequence[int],
    *,
    positions: Int[Tensor, "batch pos"] | None = None,
    lens: Lens = LOGIT_LENS,
) -> Float[Tensor, "depth batch pos token"]:
    """Lens logits of chosen tokens at every depth 0..L; one forward, no vocabulary-sized tensor.

    Args:
        model: to run.
        x: prompts.
        tokens: ids to read out.
        positions: per row; None is the readout.
        lens: a ``TunedLens``, or a ``LogitLens`` without the final norm.
    """
    return read_rows(model, residual_rows(model, x, positions), tokens, lens)


def read_rows(
    model: HookedALM, rows: Rows, tokens: Sequence[int] | None = None, lens: Lens = LOGIT_LENS
) -> Float[Tensor, "depth batch pos token"]:
    """Lens logits of residual rows of every depth 0..L; see ``unembed_rows``."""
    return unembed_rows(model, translated(lens, rows), tokens, lens.norm)


@dataclass(frozen=True, kw_only=True, repr=False)
class LensFidelity(MethodResult):
    """Distances of the lens at each depth from the model's output.

    A lens that decodes nothing yet also shows small differences between labels (defect C32).
    """

    kl: Float[Tensor, "depth batch pos"]
    """KL(final || depth), in nats."""
    agrees: Float[Tensor, "depth batch pos"]
    """Agreement with the output: 1 where the top token is the final one, else 0."""
    entropy: Float[Tensor, "depth batch pos"]
    """Entropy of the lens distribution, in nats."""
    residual_norm: Float[Tensor, "depth batch pos"]
    normaliser: Float[Tensor, "depth batch pos"]
    """Log-sum-exp of the lens' logits: what makes them log-probabilities."""


@torch.no_grad()
def lens_fidelity(
    model: HookedALM,
    rows: Rows,
    *,
    lens: Lens = LOGIT_LENS,
    chunk: int = 64,
) -> LensFidelity:
    """Compare every depth with the last over the whole vocabulary, a chunk of rows at a time.

    Args:
        model: whose lens it is.
        rows: from ``residual_rows``; ``residual_norm`` is of these, whatever the lens.
        lens: that reads depths below L; the model's own output is always normed.
        chunk: rows of the vocabulary-sized tensors held at once.
    """
    flat, norm = translated(lens, rows).flatten(1, 2), lens.norm
    weight = model.head_unembed.directions().float()  # cast once, not for every depth
    parts: list[list[Tensor]] = [[], [], [], []]
    for start in range(0, flat.shape[1], chunk):
        part = flat[:, start : start + chunk]
        last = F.linear(normalised(model, part[-1], "final"), weight).log_softmax(-1)
        for depth in range(len(flat)):
            logits = F.linear(normalised(model, part[depth], norm), weight)
            log_p = logits.log_softmax(-1)
            parts[0].append((last.exp() * (last - log_p)).sum(-1))
            parts[1].append((log_p.argmax(-1) == last.argmax(-1)).float())
            parts[2].append(-(log_p.exp() * log_p).sum(-1))
            parts[3].append((logits - log_p)[..., 0])

    def gathered(pieces: list[Tensor]) -> Any:
        per_chunk = [
            torch.stack(pieces[i : i + len(flat)]) for i in range(0, len(pieces), len(flat))
        ]
        return torch.cat(per_chunk, dim=1).reshape(rows.shape[:-1])

    return LensFidelity(
        kl=gathered(parts[0]),
        agrees=gathered(parts[1]),
        entropy=gathered(parts[2]),
        residual_norm=rows.float().norm(dim=-1),
        normaliser=gathered(parts[3]),
    )
