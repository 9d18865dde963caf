"""The invariants of the methods page, on tiny random models and on the bundled trained ones.

Every subject is a left-padded batch of two prompts with audio of different lengths, the same audio
under another instruction, and another audio under the same instruction. What is compared with
``torch.equal`` is the same kernel on the same positions of the same batch; so patches by the fast
engine, which are not, have their rounding in ``tolerances.py``.

Elsewhere in ``tests/methods``: I13 (JS and NLL) in ``reading/test_divergence.py``, I17 (win shares)
in ``statistics/test_label_scores.py``, I18 and I19 in ``statistics/test_bootstrap.py``, I20 (edge
patches) in ``patching/test_paths.py``.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen2AudioForConditionalGeneration

from hooked_alm import ALMInput, HookedALM
from hooked_alm.bundled import CLIPS, model_folder
from hooked_alm.engine.cells import called
from hooked_alm.experiments.materials.ob1 import Emotion, Language, prompt_segments
from hooked_alm.methods.patching.measurement import Measurement
from hooked_alm.methods.patching.metrics import OnLogits
from hooked_alm.methods.patching.options import Engine
from hooked_alm.methods.patching.patch import PatchMode, patch
from hooked_alm.methods.reading.attention_mass import attention_mass
from hooked_alm.methods.reading.lens import logit_lens, residual_rows, unembed_rows
from hooked_alm.points import Site
from tiny import TinyModels, hf_inputs
from tolerances import (
    FAST_ENGINE,
    LENS,
    PADDED_ROW,
    PATTERN_ROW_SUM,
    SHIFTED_POSITIONS,
    SUM_OVER_HEADS,
)

PARTITION = ("audio", "audio_struct", "text", "struct", "sink", "readout")
SITES: tuple[Site, ...] = ("resid_pre", "resid_post", "z")
ENGINES: tuple[Engine, ...] = ("hooks", "fast")
EVERY_LOGIT = OnLogits(lambda logits: logits.flatten(1))
TINY = ("gqa", "mha", "mqa, sliding")
BUNDLED = ("bundled:follows_text", "bundled:follows_voice")


class Subject:
    """A model and its three batches; runs that several tests read are made once."""

    def __init__(self, model: HookedALM, hf: Any, batches: tuple[ALMInput, ...]) -> None:
        self.model, self.hf = model, hf
        self.base, self.other_text, self.other_audio = batches
        self.dtype = model.cfg.dtype
        self.last = model.cfg.n_layers - 1
        self.layers = sorted({0, model.cfg.n_layers // 2, self.last})
        self.real = self.base.attention_mask.bool()
        self._caches: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}

    def run(self, x: ALMInput) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits and the residual stream with what is written to it."""
        if id(x) not in self._caches:
            wanted = ("hook_embed", "hook_resid_pre", "hook_resid_post", "_out", "hook_z")
            logits, cache = self.model.run_with_cache(
                x,
                names_filter=lambda name: name.endswith(wanted) and not name.startswith("audio."),
                return_cache_object=False,
            )
            self._caches[id(x)] = logits, cache
        return self._caches[id(x)]

    @cached_property
    def logits(self) -> Tensor:
        return self.run(self.base)[0]

    def swept(
        self,
        engine: Engine,
        donor: ALMInput | str,
        places: list[Any],
        site: Site,
        layers: list[int],
        **options: Any,
    ) -> Tensor:
        """Logits ``[layer, place, batch, pos, vocab]`` of the base with places of the donor in it.

        Unpatched pads and rows keep the base's.
        """
        swept = patch(
            self.model, self.base, donor, EVERY_LOGIT,
            site=site, layers=layers, places=places, engine=engine, **options,
        )  # fmt: skip
        assert np.array_equal(swept.base, self.logits.flatten(1).double())
        values = torch.from_numpy(swept.values).to(self.dtype)
        return values.unflatten(-1, (self.base.shape[1], -1))

    def assert_patched(self, engine: Engine, got: Tensor, expected: Tensor) -> None:
        """A patched run is a whole run: by a bit, or by the fast engine's rounding."""
        assert got.isfinite().all()
        if engine == "hooks":
            assert torch.equal(got, expected)
        else:
            torch.testing.assert_close(got, expected, atol=FAST_ENGINE[self.dtype], rtol=0)


def tiny_batches(model: HookedALM) -> tuple[ALMInput, ...]:
    inputs = hf_inputs([[63], [23]], [9, 14])
    ids = inputs["input_ids"].clone()
    ids[:, -4:-2] = 3 + (ids[:, -4:-2] - 2) % 300
    features = torch.randn(inputs["input_features"].shape, generator=torch.manual_seed(5))
    return (
        model.encode(**inputs),
        model.encode(**{**inputs, "input_ids": ids}),
        model.encode(**{**inputs, "input_features": features}),
    )


def bundled_batches(model: HookedALM) -> tuple[ALMInput, ...]:
    def prompts(voice: str, named: Emotion) -> ALMInput:
        languages: tuple[Language, ...] = ("en", "zh")
        return model.prepare(
            audio=[str(CLIPS / f"{language}_{voice}_strong.wav") for language in languages],
            segments=[
                prompt_segments("conflict", language, voice="neutral", named=named)
                for language in languages
            ],
        )

    return prompts("sad", "cheerful"), prompts("sad", "angry"), prompts("terrified", "cheerful")


@cache
def bundled_subject(name: str, dtype: torch.dtype) -> Subject:
    folder = model_folder(name)
    model = HookedALM.from_pretrained(folder, dtype=dtype)
    hf = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    return Subject(model, hf, bundled_batches(model))


@pytest.fixture(scope="module")
def tiny_subjects(tiny_models: TinyModels) -> dict[Any, Subject]:
    return {}


@pytest.fixture(params=(torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=(*TINY, *BUNDLED))
def subject(
    request: pytest.FixtureRequest,
    dtype: torch.dtype,
    tiny_models: TinyModels,
    tiny_subjects: dict[Any, Subject],
) -> Iterator[Subject]:
    name = request.param
    if name in BUNDLED:
        chosen = bundled_subject(name, dtype)
    else:
        if (name, dtype) not in tiny_subjects:
            model, hf = tiny_models.hooked(name, dtype), tiny_models.hf(name, dtype)
            tiny_subjects[name, dtype] = Subject(model, hf, tiny_batches(model))
        chosen = tiny_subjects[name, dtype]
    with torch.no_grad():
        yield chosen
    assert not list(chosen.model.list_hooks())


def hf_arguments(x: ALMInput) -> dict[str, Tensor]:
    """What the Hugging Face forward takes for the same prompts."""
    frames = torch.arange(x.clips[0].features.shape[-1])
    return {
        "input_ids": x.tokens,
        "attention_mask": x.attention_mask,
        "position_ids": x.position_ids,
        "input_features": torch.cat([clip.features for clip in x.clips]),
        "feature_attention_mask": torch.stack([frames < c.n_frames[0] for c in x.clips]).long(),
    }


def first_difference(a: ALMInput, b: ALMInput) -> list[int]:
    return [int((x != y).nonzero()[0]) for x, y in zip(a.tokens, b.tokens, strict=True)]


def test_subjects_can_tell(subject: Subject) -> None:
    """The invariants below would hold for a model that hears or reads nothing."""
    n_pads = (subject.base.attention_mask == 0).sum(1).tolist()
    assert sorted(n_pads)[0] == 0 < sorted(n_pads)[1]
    assert len(subject.base.spans.positions("audio", 0)) != len(
        subject.base.spans.positions("audio", 1)
    )
    for other in (subject.other_text, subject.other_audio):
        assert other.spans == subject.base.spans
        assert not torch.equal(subject.run(other)[0][:, -1], subject.logits[:, -1])


def test_i1_forward_is_hugging_face(subject: Subject) -> None:
    expected = subject.hf(**hf_arguments(subject.base)).logits
    assert torch.equal(subject.model(subject.base), expected)
    assert torch.equal(subject.model.run_with_hooks(subject.base, fwd_hooks=[]), expected)


def test_i2_lens_of_the_last_depth_is_the_output(subject: Subject) -> None:
    resid = subject.run(subject.base)[1][f"blocks.{subject.last}.hook_resid_post"]
    lens = unembed_rows(subject.model, resid)
    assert lens.dtype == torch.float32
    if subject.dtype == torch.float32:
        assert torch.equal(lens, subject.logits)
    else:
        torch.testing.assert_close(lens, subject.logits.float(), atol=LENS[subject.dtype], rtol=0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("site", SITES)
def test_i3_self_patch_changes_nothing(subject: Subject, site: Site, engine: Engine) -> None:
    for donor in (subject.base, replace(subject.base)):  # also one that must run for itself
        for logits in subject.swept(engine, donor, [PARTITION], site, subject.layers)[:, 0]:
            subject.assert_patched(engine, logits, subject.logits)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
@pytest.mark.parametrize("other", ["other_text", "other_audio"])
def test_i4_patching_every_position_gives_the_donor(
    subject: Subject, site: Site, other: str, engine: Engine
) -> None:
    donor = getattr(subject, other)
    expected = subject.run(donor)[0]
    # Pad rows, which no patch writes and nothing real attends to, are left out.
    for logits in subject.swept(engine, donor, [PARTITION], site, subject.layers)[:, 0]:
        subject.assert_patched(engine, logits[subject.real], expected[subject.real])


@pytest.mark.parametrize("engine", ENGINES)
def test_i5_i6_last_block_reaches_the_readout_only_from_the_readout(
    subject: Subject, engine: Engine
) -> None:
    others = tuple(span for span in PARTITION if span != "readout")
    for donor in (subject.other_text, subject.other_audio):
        expected = subject.run(donor)[0]
        readout, rest = subject.swept(
            engine, donor, ["readout", others], "resid_post", [subject.last]
        )[0]
        subject.assert_patched(engine, readout[:, -1], expected[:, -1])
        subject.assert_patched(engine, rest[:, -1], subject.logits[:, -1])
        before = subject.real[:, :-1]
        subject.assert_patched(engine, rest[:, :-1][before], expected[:, :-1][before])


def test_i7_nothing_changes_before_the_first_difference(subject: Subject) -> None:
    base = subject.run(subject.base)[1]
    starts = [subject.base.spans["audio"][row][0][0] for row in (0, 1)]
    for other, firsts in (
        (subject.other_text, first_difference(subject.base, subject.other_text)),
        (subject.other_audio, starts),
    ):
        donor = subject.run(other)[1]
        for name, value in base.items():
            for row, first in enumerate(firsts):
                before = subject.real[row].clone()
                before[first:] = False
                assert before.any()
                assert torch.equal(value[row, before], donor[name][row, before]), name
                if name.endswith("hook_resid_pre"):
                    assert not torch.equal(value[row, first], donor[name][row, first]), name


@pytest.mark.parametrize("engine", ENGINES)
def test_i7_audio_before_the_instruction_cannot_carry_it(subject: Subject, engine: Engine) -> None:
    """So patching the audio with a text-swapped donor does exactly nothing (defect C4)."""
    for site, layers in (("resid_post", subject.layers), ("z", subject.layers[1:2])):
        for logits in subject.swept(engine, subject.other_text, ["audio"], site, layers)[:, 0]:
            subject.assert_patched(engine, logits, subject.logits)


@pytest.mark.parametrize("engine", ENGINES)
def test_i8_swapping_audio_embeddings_is_hearing_the_other_audio(
    subject: Subject, engine: Engine
) -> None:
    expected = subject.run(subject.other_audio)[0]
    logits = subject.swept(engine, subject.other_audio, ["audio"], "resid_pre", [0])[0, 0]
    subject.assert_patched(engine, logits[subject.real], expected[subject.real])


def test_i9_attention_sums_to_one(subject: Subject) -> None:
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in subject.layers]
    _, cache = subject.model.run_with_cache(subject.base, names_filter=names)
    ones = torch.ones(())
    for name in names:
        rows = cache[name].float().sum(-1).transpose(1, 2)[subject.real]
        tolerance = PATTERN_ROW_SUM[subject.dtype]
        torch.testing.assert_close(rows, ones.expand_as(rows), atol=tolerance, rtol=0)
    queries = torch.stack([mask.nonzero().flatten()[-5:] for mask in subject.real])
    mass = attention_mass(subject.model, subject.base, PARTITION, queries=queries).sum(-1)
    # fp32 whatever the model's dtype.
    tolerance = PATTERN_ROW_SUM[torch.float32]
    torch.testing.assert_close(mass, ones.expand_as(mass), atol=tolerance, rtol=0)


def test_i10_heads_add_up_to_the_attention_output(subject: Subject) -> None:
    names = [f"blocks.{layer}.attn.hook_result" for layer in subject.layers]
    _, results = subject.model.run_with_cache(subject.base, names_filter=names)
    for layer, name in zip(subject.layers, names, strict=True):
        total = results[name].float().sum(2) + subject.model.blocks[layer].attn.b_O.float()
        written = subject.run(subject.base)[1][f"blocks.{layer}.hook_attn_out"].float()
        tolerance = SUM_OVER_HEADS[subject.dtype]
        torch.testing.assert_close(total, written, atol=tolerance, rtol=0)


def test_i11_residual_stream_is_the_sum_of_what_was_written(subject: Subject) -> None:
    """Exact, since the sums are taken in the order of the model."""
    cache = subject.run(subject.base)[1]
    total = cache["hook_embed"]
    for layer in range(subject.last + 1):
        total = (
            total + cache[f"blocks.{layer}.hook_attn_out"] + cache[f"blocks.{layer}.hook_mlp_out"]
        )
        assert torch.equal(total, cache[f"blocks.{layer}.hook_resid_post"])


def test_i12_only_relative_positions_matter(subject: Subject) -> None:
    x = subject.base
    moved = subject.model(replace(x, position_ids=x.position_ids + 1000))[subject.real]
    tolerance = SHIFTED_POSITIONS[subject.dtype]
    torch.testing.assert_close(moved, subject.logits[subject.real], atol=tolerance, rtol=0)
    gap = x.position_ids + 1000 * (torch.arange(x.shape[1]) >= x.shape[1] - 2)
    apart = subject.model(replace(x, position_ids=gap))
    assert (apart[:, -1] - subject.logits[:, -1]).abs().max() > 2 * tolerance


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", ["add", "interpolate"])
def test_i14_strength_zero_does_nothing(subject: Subject, mode: PatchMode, engine: Engine) -> None:
    for site, layer in zip(SITES, subject.layers, strict=True):
        [[logits]] = subject.swept(
            engine, subject.other_audio, [PARTITION], site, [layer], mode=mode, coefficient=0.0
        )
        subject.assert_patched(engine, logits, subject.logits)


@pytest.mark.parametrize("point", ["mlp.hook_gate", "mlp.hook_post", "attn.hook_z"])
def test_i14_gain_of_minus_one_is_ablation(subject: Subject, point: str) -> None:
    name = f"blocks.{subject.layers[1]}.{point}"

    def run(edit: Any) -> Tensor:
        return subject.model.run_with_hooks(subject.base, fwd_hooks=[(name, edit)])

    assert torch.equal(run(lambda value, hook: (1 + 0.0) * value), subject.logits)
    ablated = run(lambda value, hook: torch.zeros_like(value))
    assert torch.equal(run(lambda value, hook: (1 + -1.0) * value), ablated)
    assert not torch.equal(ablated, subject.logits)

    # The same by a sweep, which leaves pads alone.
    site: Any = point.split("_")[-1]
    for engine in ENGINES:

        def swept(donor: str, engine: Engine = engine, **options: Any) -> Tensor:
            layers = subject.layers[1:2]
            return subject.swept(engine, donor, ["all"], site, layers, **options)[0, 0]

        zeros = swept("zero")
        assert torch.equal(swept("self", mode="scale", coefficient=1 + -1.0), zeros)
        subject.assert_patched(engine, zeros[subject.real], ablated[subject.real])
        gained = swept("self", mode="scale", coefficient=1 + 0.0)
        subject.assert_patched(engine, gained, subject.logits)


@pytest.mark.parametrize("engine", ENGINES)
def test_i15_lens_by_patching_the_last_block(subject: Subject, engine: Engine) -> None:
    """AudioLens reads depth k by writing r[k] to the last block's output."""
    cache = subject.run(subject.base)[1]
    lens = logit_lens(subject.model, subject.base, range(subject.logits.shape[-1]))[:, :, 0]
    at, last = subject.base.shape[1] - 1, subject.last
    n_rows = len(subject.base)
    edits = [
        called("resid_post", last, i * n_rows + row, [at], lambda _, r=state[at:]: r)
        for i, depth in enumerate(subject.layers)
        for row, state in enumerate(cache[f"blocks.{depth}.hook_resid_pre"])
    ]
    measured = Measurement(subject.model, subject.base, None, EVERY_LOGIT, engine=engine)
    found = measured.values(len(subject.layers), edits).unflatten(-1, (at + 1, -1))[:, :, -1]
    tolerance = LENS[subject.dtype]
    torch.testing.assert_close(lens[subject.layers], found, atol=tolerance, rtol=0)


def test_i16_padded_row_is_the_unpadded_run(subject: Subject) -> None:
    for row in range(len(subject.base)):
        arguments = hf_arguments(subject.base[row])
        real = subject.real[row]
        for name in ("input_ids", "attention_mask", "position_ids"):
            arguments[name] = arguments[name][:, real]
        alone = subject.model(subject.model.encode(**arguments))[0]
        tolerance = PADDED_ROW[subject.dtype]
        torch.testing.assert_close(alone, subject.logits[row, real], atol=tolerance, rtol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_seed_000_off_by_one_is_not_a_self_patch(subject: Subject, engine: Engine) -> None:
    """What I3 catches: the seed writes a block's input over its output (defect C1)."""
    layer = subject.layers[1]
    state = subject.run(subject.base)[1][f"blocks.{layer}.hook_resid_pre"]

    def write(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        for row in range(len(value)):
            for span in ("text", "readout"):
                where = subject.base.spans.positions(span, row)
                value[row, where] = state[row, where]
        return value

    hooks = [(f"blocks.{layer}.hook_resid_post", write)]
    expected = subject.model.run_with_hooks(subject.base, fwd_hooks=hooks)
    [[logits]] = subject.swept(
        engine, subject.base, [("text", "readout")], "resid_post", [layer], donor_site="resid_pre"
    )
    subject.assert_patched(engine, logits, expected)
    assert (logits[:, -1] - subject.logits[:, -1]).abs().max() > 2 * FAST_ENGINE[subject.dtype]


def test_depths_are_the_states_between_blocks(subject: Subject) -> None:
    cache = subject.run(subject.base)[1]
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(subject.last + 1)]
    names.append(f"blocks.{subject.last}.hook_resid_post")
    rows = residual_rows(subject.model, subject.base)
    assert torch.equal(rows[:, :, 0], torch.stack([cache[name][:, -1] for name in names]))
    hf = subject.hf(**hf_arguments(subject.base), output_hidden_states=True).hidden_states
    # Hugging Face's last entry is already normed (defect C2).
    for depth, state in enumerate(hf[:-1]):
        assert torch.equal(rows[depth, :, 0], state[:, -1])
    assert not torch.equal(rows[-1, :, 0], hf[-1][:, -1])
