"""What is measured of a clip: transcripts by the encoder's depth, tokens by the decoder's."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from hooked_alm.methods.reading.lens import unembed_rows
from hooked_alm.methods.reading.transcripts import end_tokens
from hooked_alm.methods.statistics.repetition import loops, repetition

from ..materials.read_by_depth import ReadByDepth
from ..materials.transcription import whose
from ..workbench.experiment import UnitResult
from ..workbench.results import Row


class ClipReader(ReadByDepth):
    """The rows of a clip."""

    @torch.no_grad()
    def result(self) -> UnitResult:
        """All of them, and the tokens of every depth."""
        log_p = self.log_probs(self.final)
        tables = {
            "transcripts": self._transcripts(log_p),
            "tokens": self._tokens(),
            "checks": [self.check(log_p[-1])],
        }
        who = whose(self.clip)
        return UnitResult.of(who, tables, {"tokens": self.said})

    def _transcripts(self, log_p: Tensor) -> Iterator[Row]:
        ours, reference = self.ours, self.ours.said_in(self.clip)
        of_reference = torch.full((len(log_p), 1), torch.nan)
        if reference is not None:
            of_reference = self.log_probs([*ours.ids(reference), *end_tokens(self.model)[:1]])
        for depth, far in enumerate(self.distances()):
            tokens = self.said[depth]
            text = ours.text(tokens)
            errors = ours.errors(reference, text)
            yield {
                "depth": depth, "text": text, "n_tokens": len(tokens),
                "reference_known": float(reference is not None),
                **{f"reference_{name}": n for name, n in errors._asdict().items()},
                "distance": far,
                "log_p_final": float(log_p[depth].double().mean()),
                "log_p_reference": float(of_reference[depth].double().mean()),
                "repetition": repetition(tokens, 1),
                "loops": float(loops(tokens)),
            }  # fmt: skip

    def _tokens(self) -> Iterator[Row]:
        """The depth of the decoder from which each token of the final transcript is the likeliest.

        Beside it, the same of random directions of the same length: what a depth would give that
        knows nothing of the token.
        """
        rows, n = self.streams(), len(self.final)
        noise = torch.randn(rows.shape, generator=self._random(), dtype=torch.float32).to(rows)
        noise *= rows.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        noise[-1] = rows[-1]
        depths, blind = self.saturation(rows), self.saturation(noise)
        there = rows[torch.from_numpy(depths), 0, torch.arange(n)]
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
