"""OB1: where does the voice's emotion lose against the instruction's?

A clip is spoken with emotion A; the instruction names emotion T. The experiment reads the label
logits at every depth (lens), exchanges the text's and the voice's part of the run (patching), and
sums attention by segment.

Source: seed document 000; methods cards M-000-1 to M-000-15. Tables: ``runs`` (one row per
forward), ``delta`` and ``depths`` (by depth), ``attention`` (by layer and segment), ``patching``
(by block and span). ``emotion_report`` makes figures and findings of them.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooked_alm.audio import read_audio
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput, AudioClip
from hooked_alm.methods.patching.alignment import align
from hooked_alm.methods.patching.metrics import LabelScores
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.reading.attention_mass import attention_density, attention_mass
from hooked_alm.methods.reading.labels import LabelSet
from hooked_alm.methods.reading.lens import lens_fidelity, residual_rows, unembed_rows

from ..materials.bundled import CLIPS, PREFIX
from ..materials.ob1 import EMOTIONS, Emotion, Language, prompt_segments
from ..materials.recordings import Recording, load_recordings, match_loudness
from ..materials.subject import described, load_hearing_subject
from ..materials.trained_lens import described_lens, load_lens
from ..workbench.experiment import Experiment, Tables, Unit, UnitResult
from ..workbench.report import Report
from ..workbench.run_folder import RunFolder
from .plan import PatchRun, PromptRun, WorkPlan
from .report import conclude
from .settings import EmotionConflictConfig

SEGMENTS = ("audio", "audio_struct", "text", "struct", "sink", "readout")
"""Partition of a prompt, for attention."""


class EmotionConflict(Experiment[EmotionConflictConfig]):
    """The OB1 experiment on any model with an audio front-end."""

    name = "emotion_conflict"
    question = "Where does the voice's emotion lose against the instruction's?"
    Config = EmotionConflictConfig

    def open(self) -> dict[str, Any]:
        """Load model and clips, and check every prompt before the first unit runs."""
        config = self.config
        self.model = load_hearing_subject(config, self.name)
        self.tuned_lens = (
            None if config.tuned_lens is None else load_lens(config.tuned_lens, self.model)
        )
        clips = CLIPS if config.audio == "bundled" else Path(config.audio)
        self.recordings = load_recordings(clips, config.n_clips)
        self.clips: dict[str, AudioClip] = {
            recording.name: self._read_clip(recording) for recording in self.recordings
        }
        languages = {self.prompt_language(recording) for recording in self.recordings}
        if missing := languages - config.labels.keys():
            raise InputError(
                f"scoring answers: got labels for {', '.join(config.labels)}, expected them for "
                f"every prompt language; add labels.{' and labels.'.join(sorted(missing))}."
            )
        self.labels = {
            language: LabelSet.from_texts(
                self.model.tokenizer, {str(k): v for k, v in words.items()}, config.label_mode
            )
            for language, words in config.labels.items()
            if language in languages
        }
        if config.patch_layers is not None:
            wrong = [b for b in config.patch_layers if not 0 <= b < self.model.cfg.n_layers]
            if wrong:
                raise InputError(
                    f"patching blocks {wrong}: the model has blocks 0 to "
                    f"{self.model.cfg.n_layers - 1}."
                )
        for unit in self.units():
            self._check(unit)
        return {
            "model": described(self.model, config),
            "known_defects": config.known_defects(),
            **(
                {}
                if config.tuned_lens is None
                else {"tuned_lens": described_lens(config.tuned_lens)}
            ),
            "label_token_ids": {language: self._label_ids(language) for language in self.labels},
            "sweeps_without_a_clip_for_the_donor": self.plan.impossible_sweeps(),
            "clips": [
                {
                    "name": r.name,
                    "sha256": r.sha256,
                    "seconds": self.clips[r.name].seconds,
                    "audio_tokens": self.clips[r.name].n_tokens,
                    "notes": [*r.notes, *self.clips[r.name].notes],
                }
                for r in self.recordings
            ],
        }

    def _read_clip(self, recording: Recording) -> AudioClip:
        config = self.config
        clip = self.model.read_clip(recording.path, truncate=config.truncate)
        if config.loudness_dbfs is None:
            return clip
        assert self.model.prompts is not None
        rate = self.model.prompts.feature_extractor.sampling_rate
        waveform = read_audio(
            recording.path, sampling_rate=rate, max_seconds=clip.seconds, truncate=True
        )
        matched = self.model.read_clip(match_loudness(waveform.samples, config.loudness_dbfs))
        note = f"scaled to {config.loudness_dbfs:g} dBFS"
        return replace(matched, name=clip.name, notes=(*clip.notes, note))

    def _label_ids(self, language: Language) -> dict[str, Any]:
        labels = self.labels[language]
        return dict(zip(labels.names, labels.spellings, strict=True))

    def _check(self, unit: Unit) -> None:
        """Tokenise a unit's prompts and align its spans, which could fail in the midst of a run."""
        if isinstance(unit.payload, PromptRun):
            self.input(unit.payload)
            return
        base, donor = self.input(unit.payload.base), self.input(unit.payload.donor)
        if self.config.align == "dtw":  # aligns spans of any length, by activations
            return
        try:
            for spans in self.config.patched_spans().values():
                align(base, donor, spans, policy=self.config.align_policies())
        except InputError as error:
            error.add_note(f"This would happen in unit {unit.id}; nothing was run.")
            raise

    def prompt_language(self, recording: Recording) -> Language:
        """Language of instruction and labels."""
        chosen = self.config.prompt_language
        return recording.language if chosen == "clip" else chosen

    def input(self, run: PromptRun) -> ALMInput:
        """The prompt of one run."""
        index = self.recordings.index(run.recording)
        language = self.prompt_language(run.recording)
        segments = prompt_segments(
            run.condition,
            language,
            voice=run.recording.emotion,
            named=run.named,
            words={
                e: w if isinstance(w, str) else w[0]
                for e, w in self.config.labels[language].items()
            },
            # A different label comes first in every clip, so that no place in the list is favoured.
            order=EMOTIONS[index % 5 :] + EMOTIONS[: index % 5],
        )
        return self.model.prepare(self.clips[run.recording.name], segments=segments)

    @property
    def plan(self) -> WorkPlan:
        """What is run on these recordings."""
        return WorkPlan(self.config, self.recordings)

    def units(self) -> list[Unit]:
        """All runs, then all sweeps."""
        return self.plan.units()

    def run_unit(self, unit: Unit) -> UnitResult:
        """One forward with its read-outs, or one sweep."""
        if isinstance(unit.payload, PatchRun):
            return self._run_sweep(unit.id, unit.payload)
        return self._run_prompt(unit.id, unit.payload)

    @torch.no_grad()
    def _run_prompt(self, unit: str, run: PromptRun) -> UnitResult:
        model, labels = self.model, self.labels[self.prompt_language(run.recording)]
        x = self.input(run)
        rows = residual_rows(model, x)
        final = model(x)[0, -1].float()
        lens_rows = rows if self.tuned_lens is None else self.tuned_lens(rows)
        lens_rows = lens_rows if self.config.lens_depths == "all" else lens_rows[:-1]
        lens = labels.scores(unembed_rows(model, lens_rows, labels.tokens, self.config.lens_norm))[
            :, 0, 0
        ]
        scores = labels.scores(final[labels.tokens])
        fidelity = lens_fidelity(
            model, rows, norm=self.config.lens_norm, translators=self.tuned_lens
        )
        mass = attention_mass(model, x, SEGMENTS)[:, 0, :, 0]
        density = attention_density(mass[:, None, :, None], x, SEGMENTS)[:, 0, :, 0]
        tables = {
            "runs": [self._run_row(unit, run, x, final, scores, labels)],
            "delta": [
                {"unit": unit, "target": target, "depth": depth, "delta": float(delta)}
                for target in run.targets
                for depth, delta in enumerate(_contrast(lens, labels, target, self._against(run)))
            ],
            "depths": [
                {
                    "unit": unit,
                    "depth": depth,
                    **_by_label("z", labels, lens[depth]),
                    **_by_label("p", labels, lens[depth].softmax(-1)),
                    "prediction": labels.names[int(lens[depth].argmax())],
                    "kl": float(fidelity.kl[depth, 0, 0]),
                    "agrees": float(fidelity.agrees[depth, 0, 0]),
                    "entropy": float(fidelity.entropy[depth, 0, 0]),
                    "residual_norm": float(fidelity.residual_norm[depth, 0, 0]),
                }
                for depth in range(len(lens))
            ],
            "attention": _attention_rows(unit, x, mass, density),
        }
        delta = _contrast(lens, labels, run.targets[0], self._against(run)).tolist()
        record = {
            **self._described(run, x),
            "delta_logit_by_depth": delta,
            "delta_logit_by_text_layer": delta[: model.cfg.n_layers],
            "attention_mass_by_head": {"segments": SEGMENTS, "layer_head_segment": mass.tolist()},
            "attn_probe_last_token": {
                "mass_audio": mass[..., SEGMENTS.index("audio")].mean(-1).tolist(),
                "mass_text": mass[..., SEGMENTS.index("text")].mean(-1).tolist(),
            },
        }
        return UnitResult(tables=tables, record=record)

    def _against(self, run: PromptRun) -> Emotion:
        """The emotion that the contrast subtracts.

        It is the voice's. Seed 000 subtracts what the run was labelled with, so that its consistent
        runs are a label minus itself (defect C8).
        """
        if self.config.contrast == "seed" and run.condition == "consistent":
            return run.targets[0]
        return run.recording.emotion

    def _run_row(
        self,
        unit: str,
        run: PromptRun,
        x: ALMInput,
        final: Tensor,
        scores: Tensor,
        labels: LabelSet,
    ) -> dict[str, Any]:
        log_p = final.log_softmax(-1)
        best = final[labels.tokens].max()
        top = int(final.argmax())
        return {
            "unit": unit,
            **_identity(run, self.prompt_language(run.recording)),
            "prediction": labels.names[int(scores.argmax())],
            **_by_label("z", labels, scores),
            "delta_final": float(_contrast(scores, labels, run.targets[0], self._against(run))),
            "label_mass": float(log_p[labels.tokens].exp().sum()),
            "best_label_rank": int((final > best).sum()) + 1,
            "top_token": self.model.tokenizer.decode([top]),
            "n_tokens": int(x.attention_mask.sum()),
            "n_audio_tokens": len(x.spans.positions("audio", 0)),
        }

    @torch.no_grad()
    def _run_sweep(self, unit: str, sweep: PatchRun) -> UnitResult:
        model, config = self.model, self.config
        labels = self.labels[self.prompt_language(sweep.base.recording)]
        base, donor = self.input(sweep.base), self.input(sweep.donor)
        layers = config.patched_layers(model.cfg.n_layers)
        spans = config.patched_spans()
        result = patch(
            model,
            base,
            donor,
            LabelScores(labels),
            site="resid_post",
            layers=layers,
            places=list(spans.values()),
            policy=config.align_policies(),
            # The seed's donor is the state before the patched block (defect C1).
            donor_site="resid_pre" if config.donor_index == "seed_hs" else None,
            engine=config.engine,
            max_bytes=config.max_bytes,
        )
        to, away = (labels.index(name) for name in sweep.toward)
        # In fp32, as they were measured, and as the scores of whole runs are.
        cells, base_scores, donor_scores = (
            torch.from_numpy(values).float()
            for values in (result.values[:, :, 0], result.base[0], result.donor[0])
        )
        base_metric = float(base_scores[to] - base_scores[away])
        donor_metric = float(donor_scores[to] - donor_scores[away])
        total = donor_metric - base_metric
        base_label = labels.names[int(base_scores.argmax())]
        rows = []
        for i, layer in enumerate(layers):
            for j, span in enumerate(spans):
                scores = cells[i, j]
                shift = float(scores[to] - scores[away]) - base_metric
                prediction = labels.names[int(scores.argmax())]
                rows.append(
                    {
                        "unit": unit,
                        **_identity(sweep.base, self.prompt_language(sweep.base.recording)),
                        "donor": sweep.kind,
                        "donor_clip": sweep.donor.recording.name,
                        "donor_named": sweep.donor.named,
                        "toward": sweep.toward[0],
                        "block": layer,
                        "span": span,
                        "prediction": prediction,
                        "flip": float(prediction != base_label),
                        "shift": shift,
                        "recovery": shift / total if abs(total) >= config.min_effect else np.nan,
                        "base": base_metric,
                        "donor_metric": donor_metric,
                        "total_effect": total,
                        **_by_label("z", labels, scores),
                    }
                )
        record = {
            **self._described(sweep.base, base),
            "donor": self._described(sweep.donor, donor),
            "span_length_ratio": result.length_ratios[0],
            "base_scores": base_scores.tolist(),
            "donor_scores": donor_scores.tolist(),
            "base_prediction": base_label,
            "donor_prediction": labels.names[int(donor_scores.argmax())],
        }
        return UnitResult(tables={"patching": rows}, record=record)

    def _described(self, run: PromptRun, x: ALMInput) -> dict[str, Any]:
        config = self.config
        return {
            **_identity(run, self.prompt_language(run.recording)),
            "model": config.model,
            "revision": config.revision,
            "dtype": config.dtype,
            "seed": config.seed,
            "variant": config.variant,
            "known_defects": sorted(config.known_defects()),
            "spans": {name: rows[0] for name, rows in x.spans.to_json().items()},
            "position_ids": x.position_ids[0].tolist(),
            "token_ids": x.tokens[0].tolist(),
            "label_token_ids": self._label_ids(self.prompt_language(run.recording)),
        }

    def conclude(self, tables: Tables, folder: RunFolder) -> Report:
        """Figures, summaries and findings, from the tables alone."""
        return conclude(
            tables,
            folder,
            self.config,
            recordings=self.recordings,
            n_blocks=self.model.cfg.n_layers,
            is_calibration=self.config.model.startswith(PREFIX),
        )


def _identity(run: PromptRun, prompt_language: Language) -> dict[str, Any]:
    return {
        "clip": run.recording.name,
        "language": run.recording.language,
        "prompt_language": prompt_language,
        "voice": run.recording.emotion,
        "intensity": run.recording.intensity,
        "condition": run.condition,
        "named": run.named,
        "target": run.targets[0],
    }


def _contrast(scores: Tensor, labels: LabelSet, target: Emotion, against: Emotion) -> Tensor:
    return scores[..., labels.index(target)] - scores[..., labels.index(against)]


def _by_label(prefix: str, labels: LabelSet, values: Tensor) -> dict[str, float]:
    return {
        f"{prefix}_{name}": value for name, value in zip(labels.names, values.tolist(), strict=True)
    }


def _attention_rows(unit: str, x: ALMInput, mass: Tensor, density: Tensor) -> list[dict[str, Any]]:
    sink = mass[..., SEGMENTS.index("sink")]
    rows = []
    for index, span in enumerate(SEGMENTS):
        without_sink = mass[..., index] / (1 - sink)
        for layer in range(len(mass)):
            rows.append(
                {
                    "unit": unit,
                    "layer": layer,
                    "span": span,
                    "mass": float(mass[layer, :, index].mean()),
                    "density": float(density[layer, :, index].mean()),
                    "mass_without_sink": np.nan
                    if span == "sink"
                    else float(without_sink[layer].mean()),
                    "n_tokens": len(x.spans.positions(span, 0)),
                }
            )
    return rows
