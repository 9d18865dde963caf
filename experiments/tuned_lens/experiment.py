"""Tuned lens: train a translator per depth, and see what it reads that the logit lens does not.

The model is frozen; translators learn to predict its output from the residual stream of one depth
(``methods.reading.tuned_lens``). Prompts are those of OB1 on the bundled clips or on a folder of
your own, or of a file (``items``). Groups of prompts are held out; on these the KL divergence of
either lens from the output is measured at every depth.

The run folder has the lens in ``lens/``, for any experiment that takes one
(``-s tuned_lens=RUN/lens`` of emotion_conflict).

Source: Belrose et al. 2023; S-2.
"""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.bundled import CLIPS
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.reading.lens import lens_fidelity, read_rows, residual_rows
from hooked_alm.methods.reading.tuned_lens import LensTrainer, TunedLens, unembed_hash

from ..materials.checkpoints import FOLDER, Checkpoints
from ..materials.clips import described_table
from ..materials.held_out import split_groups
from ..materials.recordings import load_recordings
from ..materials.subject import ModelExperiment, described
from ..materials.trained_lens import (
    PARAMS,
    LensCard,
    lens_bytes,
    load_lens,
    save_lens,
)
from ..workbench.batches import BatchedExperiment, batch_units, bucketed, heaviest
from ..workbench.experiment import Unit, UnitResult
from ..workbench.page import Page
from .claims import CLAIMS, CONTROLS
from .items import LensPrompt, ob1_prompts, prepare_prompts, read_prompts
from .pages import CAVEATS, fill_page, lead, method
from .settings import TunedLensConfig
from .tables import TABLES, LensResults, summarise

PLACES = {"audio": ("audio",), "text": ("text",), "struct": ("audio_struct", "struct"),
          "readout": ("readout",)}  # fmt: skip
"""Where a lens is judged, beside ``scored``: every position that the loss counts."""


class TuneLens(BatchedExperiment[TunedLensConfig], ModelExperiment[TunedLensConfig]):
    """Training and held-out evaluation of a tuned lens.

    Training is cut into units of some steps. A unit begins with the checkpoint that the one before
    it left in the run folder, so these units run in their order, and a killed run goes on from the
    last checkpoint.
    """

    name = "tuned_lens"
    title = "Tuned lens"
    question = "What can be read off each depth, once a translator is trained to?"
    Config = TunedLensConfig
    schema_version = 4
    leaves = (FOLDER, "lens")
    tables, controls, claims = TABLES, CONTROLS, CLAIMS
    caveats = CAVEATS

    def identify(self) -> dict[str, Any]:
        """Reads the prompts, and prepares every one."""
        config = self.config
        prompts, about = self._read_prompts()
        parts = split_groups([p.group for p in prompts], 1 - config.held_out_share, config.seed)
        self.held_out = [p for p in prompts if parts[p.group] == "held-out"]
        self.train = [p for p in prompts if p not in self.held_out]
        if not self.held_out:
            raise InputError(
                f"splitting {len(prompts)} prompts into training and held-out ones: got one group "
                f"({prompts[0].group}), expected at least two. Give prompts of more groups."
            )
        self.model = self.lay_out()
        self.inputs = prepare_prompts(self.model, prompts, truncate=config.truncate)
        self._check_positions()
        self.training = {
            **config.model_dump(
                include={"n_steps", "prompts_per_step", "optimizer", "learning_rate",
                         "weight_decay", "max_grad_norm", "seed"}
            ),
            "groups": sorted({p.group for p in self.train}),
            "prompts": len(self.train),
            "tokens": sum(len(self._positions(self.inputs[p.id])) for p in self.train),
        }  # fmt: skip
        self.of_model = described(self.model, config)
        return {
            "model": self.of_model,
            **about,
            "training": self.training,
            "held_out_groups": sorted({p.group for p in self.held_out}),
            "prompts": [p.described() for p in prompts],
        }

    def load(self) -> None:
        """Loads the weights; prompts go where the model is."""
        super().load()
        device = self.model.cfg.device
        self.inputs = {name: x.to(device) for name, x in self.inputs.items()}
        self._kept: dict[str, Tensor] = {}
        self._trainer: LensTrainer | None = None
        self._trained: TunedLens | None = None

    def _card(self) -> LensCard:
        """What says of the trained lens whose it is."""
        model = self.model
        return LensCard(
            **{key: self.of_model[key] for key in ("revision", "weights_sha256", "architecture")},
            model=self.config.model,
            dtype=self.config.dtype,
            n_layers=len(model.path),
            d_model=model.cfg.d_model,
            unembed_sha256=unembed_hash(model),
            scored=self.config.scored,
            training=self.training,
        )

    def _read_prompts(self) -> tuple[list[LensPrompt], dict[str, Any]]:
        """The prompts, and what identifies their table."""
        config = self.config
        if config.prompts is not None:
            return read_prompts(config.prompts), described_table(config.prompts)
        source = CLIPS if config.audio == "bundled" else config.audio
        return ob1_prompts(load_recordings(source)), described_table(source)

    def _check_positions(self) -> None:
        empty = [p.id for p in self.train + self.held_out if not self._positions(self.inputs[p.id])]
        if empty:
            raise InputError(
                f"choosing the positions to train on: got none in {len(empty)} prompts "
                f"({', '.join(empty[:3])}), expected some in each. Leave these prompts out."
            )

    def _positions(self, x: ALMInput) -> list[int]:
        """Positions of a prompt that the loss counts."""
        if self.config.scored == "readout":
            return x.spans.positions("readout", 0)
        counted = x.attention_mask[0].bool().cpu()
        if self.config.scored == "without_audio":
            counted &= ~x.spans.mask("audio")[0]
        return counted.nonzero().flatten().tolist()

    # --- Units

    def units(self) -> list[Unit]:
        """Training, a few steps a unit; then held-out prompts, some batches a unit."""
        held_out = ((f"heldout__{p.id}", p) for p in self.held_out)
        checkpoints = self._checkpoints
        return checkpoints.units() + batch_units(held_out, self.config, after=checkpoints.last_unit)

    def measure(self, unit: Unit) -> UnitResult:
        """Some steps, or the evaluation of some prompts."""
        work = unit.payload
        return self._run_steps(work) if isinstance(work, range) else super().measure(unit)

    def n_positions(self, work: LensPrompt) -> int:
        """Positions of a prompt."""
        return self.inputs[work.id].shape[1]

    def _run_steps(self, steps: range) -> UnitResult:
        trainer = self._trainer_at(steps.start)
        rows = []
        for step in steps:
            done = trainer.step(self._rows(prompt.id) for prompt in self._prompts_of(step))
            about = {"step": step, "learning_rate": done.learning_rate}
            about |= {"grad_norm": done.grad_norm, "n_tokens": done.n_tokens}
            rows += [{**about, "depth": k, "kl": kl} for k, kl in enumerate(done.kl.tolist())]
        record = self._checkpoints.write(steps, trainer.state())
        if steps.stop == self.config.n_steps:
            save_lens(trainer.lens, self._card(), self._params.parent)
        lens = hashlib.sha256(lens_bytes(trainer.lens)).hexdigest()
        return UnitResult({"training": rows}, {**record, "lens": lens})

    def _trainer_at(self, step: int) -> LensTrainer:
        if self._trainer is None or self._trainer.n_done != step:
            lens = TunedLens.untrained(self.model)
            training = self.config.training()
            self._trainer = LensTrainer(self.model, lens, training, chunk=self.config.chunk)
            if step:
                self._trainer.restore(self._checkpoints.read(step))
        return self._trainer

    def _prompts_of(self, step: int) -> list[LensPrompt]:
        """The prompts of one step: the next of an endless row of shuffled passes over all."""
        n, size = len(self.train), self.config.prompts_per_step
        places = [divmod(i, n) for i in range(step * size, (step + 1) * size)]
        orders = {
            epoch: np.random.default_rng([self.config.seed, epoch]).permutation(n)
            for epoch in {epoch for epoch, _ in places}
        }
        return [self.train[orders[epoch][place]] for epoch, place in places]

    def _rows(self, prompt: str) -> Float[Tensor, "depth token d_model"]:
        """The residual stream of a prompt at the positions that the loss counts."""
        if prompt not in self._kept:
            batch = self._batches.get(prompt, [prompt])
            inputs = [self.inputs[one] for one in batch]
            found = _streams(self.model, inputs, [self._positions(x) for x in inputs])
            if prompt not in self._batches:
                return found[0]
            self._kept |= zip(batch, found, strict=True)
        return self._kept[prompt]

    @cached_property
    def _batches(self) -> dict[str, list[str]]:
        """Id of a training prompt whose stream is kept -> those that run together with it.

        Others run alone, whenever a step needs them. Which are kept is settled by their sizes, so
        that a resumed run, which has none yet, runs the same ones together.
        """
        config, width = self.config, self.model.cfg.d_model * (len(self.model.path) + 1)
        sizes = [width * len(self._positions(self.inputs[one.id])) for one in self.train]
        lengths = [self.n_positions(one) for one in self.train]
        room, found = config.max_bytes // self.model.cfg.dtype.itemsize, dict[str, list[str]]()
        for batch in bucketed(lengths, config.batch_size, config.batch_positions):
            if (room := room - sum(sizes[i] for i in batch)) < 0:
                break
            names = [self.train[i].id for i in batch]
            found |= dict.fromkeys(names, names)
        return found

    @torch.no_grad()
    def measure_batch(self, works: Sequence[LensPrompt]) -> list[UnitResult]:
        """What either lens reads of held-out prompts."""
        inputs = [self.inputs[one.id] for one in works]
        real = [x.attention_mask[0].nonzero().flatten().tolist() for x in inputs]
        streams = _streams(self.model, inputs, real)
        return [self._judged(*one) for one in zip(works, inputs, real, streams, strict=True)]

    def try_batch(self, size: int) -> int:
        """Runs the longest prompts; no lens is trained yet that could read them."""
        every = [*self.inputs.values()]
        longest = heaviest([x.shape[1] for x in every], size, self.config.batch_positions)
        inputs = [every[i] for i in longest]
        _streams(self.model, inputs, [[*range(x.shape[1])] for x in inputs])
        return len(inputs)

    def _judged(
        self,
        prompt: LensPrompt,
        x: ALMInput,
        real: Sequence[int],
        stream: Float[Tensor, "depth token d_model"],
    ) -> UnitResult:
        lens, model, rows = self._lens(), self.model, stream[:, None]
        by_lens = {
            "logit": lens_fidelity(model, rows, chunk=self.config.chunk),
            "tuned": lens_fidelity(model, rows, lens=lens, chunk=self.config.chunk),
        }
        places = {"scored": self._positions(x)} | {
            place: sorted(pos for span in spans for pos in x.spans.positions(span, 0))
            for place, spans in PLACES.items()
        }
        who = {"prompt": prompt.id, "group": prompt.group}
        index = {pos: i for i, pos in enumerate(real)}
        found = []
        for place, positions in places.items():
            if not positions:
                continue
            at = torch.tensor([index[pos] for pos in positions], device=rows.device)
            for depth in range(len(rows)):
                row: dict[str, Any] = {**who, "place": place, "depth": depth}
                for name, fidelity in by_lens.items():
                    row[f"kl_{name}"] = float(fidelity.kl[depth, 0, at].double().mean())
                    row[f"agrees_{name}"] = float(fidelity.agrees[depth, 0, at].mean())
                found.append({**row, "n_positions": len(positions)})
        control = {**who, "difference": self._untrained_difference(rows[:, :, -1:])}
        return UnitResult(
            {"held_out": found, "untrained": [control]},
            {**who, "spans": x.spans.row_to_json(0)},
        )

    def _untrained_difference(self, rows: Tensor) -> float:
        """Largest difference between the logit lens and an untrained tuned lens."""
        plain = read_rows(self.model, rows)
        untrained = read_rows(self.model, rows, lens=TunedLens.untrained(self.model))
        return float((plain - untrained).abs().max())

    # --- What is kept between units

    @property
    def _checkpoints(self) -> Checkpoints:
        config = self.config
        return Checkpoints(self.folder, config.n_steps, config.steps_per_checkpoint, ["lens"])

    @property
    def _params(self) -> Path:
        return self.folder.inside(f"lens/{PARAMS}")

    def _lens(self) -> TunedLens:
        """The trained lens, as the last step has left it."""
        if self._trained is None:
            self._trained = load_lens(self._params.parent, self.model)
            self._check_lens()
            self._trained.requires_grad_(False)
        return self._trained

    def _check_lens(self) -> None:
        self._checkpoints.check(self._params, self.config.n_steps, "lens")

    # --- What is made of it

    def summaries(self, run: LensResults) -> Iterable[tuple[str, pd.DataFrame]]:
        """By depth and place, where answers settle, and the end of training."""
        return summarise(run)

    def lead(self, run: LensResults) -> str:
        """What the two lenses are, and where the trained one is."""
        return lead(run)

    def page(self, page: Page, run: LensResults) -> None:
        """Both lenses on held-out prompts, and the training."""
        self._check_lens()
        self._checkpoints.remove()
        fill_page(page, run)

    def method(self, run: LensResults) -> str:
        """How the lens was trained and judged."""
        return method(run)


def _streams(
    model: HookedALM, inputs: Sequence[ALMInput], positions: Sequence[Sequence[int]]
) -> list[Float[Tensor, "depth token d_model"]]:
    """The residual stream of prompts at some of their positions, at every depth; one forward."""
    x, n = ALMInput.joined(inputs), max(map(len, positions))
    moved = [[x.shape[1] - one.shape[1] + at for at in some]
             for one, some in zip(inputs, positions, strict=True)]  # fmt: skip
    # As many of each: the first of a row stands in for those that it lacks.
    rows = residual_rows(
        model, x, torch.tensor([some + some[:1] * (n - len(some)) for some in moved])
    )
    return [rows[:, row, : len(some)].clone() for row, some in enumerate(positions)]
