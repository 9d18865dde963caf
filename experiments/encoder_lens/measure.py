"""What is measured of a clip: transcripts by the encoder's depth, tokens by the decoder's."""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.reading.encoder_lens import (
    encoder_lens,
    ends_of,
    heard_by_depth,
    transcripts_by_depth,
)
from hooked_alm.methods.reading.lens import lens_fidelity, residual_rows, unembed_rows
from hooked_alm.methods.statistics.critical_layer import settling_depths
from hooked_alm.methods.statistics.repetition import loops, repetition
from hooked_alm.methods.statistics.word_errors import distance

from ..materials.clips import ClipFile
from ..materials.transcription import Transcription, whose
from ..workbench.experiment import UnitResult
from ..workbench.results import Row


class ClipReader:
    """A clip, as the model hears it at every depth of the encoder, and what it then writes."""

    def __init__(self, model: HookedALM, ours: Transcription, clip: ClipFile) -> None:
        """Runs the encoder, and the decoder on each of its depths."""
        self.model, self.ours, self.clip = model, ours, clip
        self.x = ours.input(clip).to(model.cfg.device)
        self.heard = heard_by_depth(model, self.x)
        most = ours.config.max_new_tokens
        self.said = transcripts_by_depth(
            model, self.x, self.heard, most, suppress=ours.config.suppress
        )
        # With the token that ends it, unless it was cut off.
        is_whole = len(self.said[-1]) < most
        self.final = [*self.said[-1], *(ends_of(model)[:1] if is_whole else ())]

    @torch.no_grad()
    def result(self) -> UnitResult:
        """The rows of the clip."""
        log_p = self._log_probs(self.final)
        tables = {
            "transcripts": self._transcripts(log_p),
            "tokens": self._tokens(),
            "checks": [self._check(log_p[-1])],
        }
        who = whose(self.clip)
        return UnitResult(
            {name: [{**who, **row} for row in rows] for name, rows in tables.items()},
            {"tokens": self.said},
        )

    def _transcripts(self, log_p: Tensor) -> Iterator[Row]:
        ours, reference = self.ours, self.ours.said_in(self.clip)
        of_reference = None
        if reference is not None:
            ids = [*ours.ids(reference), *ends_of(self.model)[:1]]
            of_reference = self._log_probs(ids)
        final = ours.text(self.said[-1])
        for depth, tokens in enumerate(self.said):
            text = ours.text(tokens)
            errors = ours.errors(reference, text)
            yield {
                "depth": depth, "text": text, "n_tokens": len(tokens),
                "reference_known": float(reference is not None),
                **{f"reference_{name}": n for name, n in errors._asdict().items()},
                "distance": distance(final, text, normalise=ours.normalise),
                "log_p_final": float(log_p[depth].double().mean()),
                "log_p_reference": float("nan") if of_reference is None
                else float(of_reference[depth].double().mean()),
                "repetition": repetition(tokens, 1),
                "loops": float(loops(tokens)),
            }  # fmt: skip

    def _tokens(self) -> Iterator[Row]:
        """The depth of the decoder from which each token of the final transcript is the likeliest.

        Beside it, the same of random directions of the same length: what a depth would give that
        knows nothing of the token.
        """
        y = self._extended(self.final)
        first, n = y.shape[1] - len(self.final) - 1, len(self.final)
        rows = residual_rows(self.model, y, torch.arange(first, first + n)[None])
        depths = settling_depths(lens_fidelity(self.model, rows).agrees[:, 0].T.cpu().numpy() > 0)
        noise = torch.randn(rows.shape, generator=self._random(), dtype=torch.float32).to(rows)
        noise *= rows.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        noise[-1] = rows[-1]
        blind = settling_depths(lens_fidelity(self.model, noise).agrees[:, 0].T.cpu().numpy() > 0)
        there = rows[torch.from_numpy(depths).long(), 0, torch.arange(n)]
        best = unembed_rows(self.model, there).topk(2).values
        for i, (token, margin) in enumerate(zip(self.final, best[:, 0] - best[:, 1], strict=True)):
            yield {
                "place": i, "token": self.model.tokenizer.decode([token]), "depth": int(depths[i]),
                "margin": float(margin), "random_depth": int(blind[i]),
            }  # fmt: skip

    def _random(self) -> torch.Generator:
        """Draws that depend on the clip alone, not on the others."""
        digest = hashlib.sha256(f"{self.ours.config.seed}/{self.clip.name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def _extended(self, tokens: Sequence[int]) -> ALMInput:
        return self.x.extend(torch.tensor([tokens], dtype=torch.long, device=self.x.device))

    def _log_probs(self, tokens: Sequence[int]) -> Float[Tensor, "depth token"]:
        """Log-probability of every token, given those before it, at every depth."""
        found = encoder_lens(self.model, self._extended(tokens), self.heard)
        return found[:, 0, found.shape[-1] - len(tokens) :]

    def _check(self, log_p: Tensor) -> Row:
        """The last depth against the model, which knows of no depths."""
        assert self.model.audio is not None
        logits = self.model(self._extended(self.final))[0, -len(self.final) - 1 : -1]
        said = torch.tensor(self.final, device=logits.device)
        own = logits.log_softmax(-1).gather(-1, said[:, None])[:, 0]
        return {
            "memory": float((self.model.audio.heard(self.x) - self.heard[-1]).abs().max()),
            "log_p": float((own - log_p).abs().max()),
            "not_greedy": float((logits.argmax(-1) != said).double().mean()),
        }
