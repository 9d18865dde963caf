"""Every family: equal to its reference, and every way to get it wrong is noticed."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import WhisperFeatureExtractor

from all_cases import CASES
from encoder_reference import CLOSE, encoder_recorded, layers_that_run
from engine_runs import both, moved, rounding
from family_case import Case, Inputs, Run
from hooked_alm import ALMInput, ConversionError, HookedALM, InputError
from hooked_alm.audio import Waveform
from hooked_alm.converters.parity import Accounting, run_ours, verify
from hooked_alm.converters.registry import FAMILIES, load_family
from hooked_alm.encoder import ChunkedEncoder
from hooked_alm.log_mel import windows_with_gradient
from hooked_alm.methods.patching.enrich import enrich
from hooked_alm.methods.patching.knock_out import knock_out
from hooked_alm.methods.patching.metrics import LogitDiff, OnLogits
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.patching.paths import path_patch
from hooked_alm.methods.reading.lens import residual_rows
from hooked_alm.points import Site
from tolerances import ENCODER_BATCH, FAST_ENGINE, OTHER_KERNEL

GREEDY = 6
LAST = OnLogits(lambda logits: logits[:, -2:].flatten(1))
OPAQUE = {"GLM-ASR", "Granite-Speech", "Kimi-Audio", "MiMo-Audio", "Qwen3-ASR"}
"""Cases whose encoder is another, and has no points inside."""


class Subjects:
    """Checkpoints, models and references of the cases, each made once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made: dict[Any, Any] = {}

    def folder(self, case: Case, dtype: torch.dtype = torch.float32) -> Path:
        """A checkpoint."""
        folder = self.root / f"{case.name} {dtype}" / "model"

        def make() -> Path:
            folder.mkdir(parents=True)
            case.save(folder, dtype)
            return folder

        return self._once((case.name, dtype), make)

    def load(self, case: Case, folder: Path, parts: Any = (), **options: Any) -> HookedALM:
        """Ours, freshly loaded; ``parts`` replace the case's components."""
        components = {**case.components(self.folder(case)), **dict(parts)}
        return HookedALM.from_pretrained(folder, components=components, **options)

    def hooked(
        self, case: Case, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
    ) -> HookedALM:
        """Ours, shared between tests."""
        return self._once(
            ("hooked", case.name, dtype, attention),
            lambda: self.load(case, self.folder(case), dtype=dtype, attn_implementation=attention),
        )

    def expected(
        self, case: Case, what: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
    ) -> Run:
        """The reference's run."""
        return self._once(
            ("run", case.name, what, dtype, attention),
            lambda: self.reference(case, dtype, attention).run(batches(case)[what]),
        )

    def reference(self, case: Case, dtype: torch.dtype, attention: str) -> Any:
        """The reference."""
        return self._once(
            ("reference", case.name, dtype, attention),
            lambda: case.reference(self.folder(case), dtype, attention),
        )

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Subjects:
    return Subjects(tmp_path_factory.mktemp("families"))


def batches(case: Case) -> dict[str, Inputs]:
    """Prompts that differ in where their audio is."""
    short, middling, long = case.clips
    found = {
        "left-padded, clips of different lengths": case.inputs([[middling], [short]], [9, 14]),
        "one long clip": case.inputs([[long]], [8]),
        "text only": case.inputs([[], []], [7, 12]),
    }
    assert all("position_ids" in inputs for inputs in found.values())
    return found


BATCHES = ("left-padded, clips of different lengths", "one long clip", "text only")
UNEQUAL = BATCHES[0]


def first_difference(expected: Run, found: Any, real: Tensor) -> str | None:
    """Name of the first part of a run that is not bit-equal at real positions."""
    for where, theirs in expected.items():
        ours = found[where]
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            return f"{where}: {ours.dtype} {list(ours.shape)}, {theirs.dtype} {list(theirs.shape)}"
        if not torch.equal(ours[real], theirs[real]):
            worst = (ours[real].float() - theirs[real].float()).abs().max().item()
            return f"{where} differs by {worst:.3g}"
    return None


def difference(case: Case, model: HookedALM, x: ALMInput, expected: Run) -> str | None:
    """Where ours departs from the reference, on every head that it ran."""
    mend = {name: case.logits(v, model) for name, v in expected.items() if name.endswith("logits")}
    expected = {**expected, **mend}
    found = {**run_ours(model, x)}
    if "audio logits" in expected:
        audio = run_ours(model.towards("audio"), x)
        found |= {f"audio {where}": value for where, value in audio.items()}
    return first_difference(expected, found, x.attention_mask.bool())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_equal_to_the_reference(
    subjects: Subjects, name: str, dtype: torch.dtype, attention: str
) -> None:
    """Logits and the residual stream at every depth; also while every hook point is watched."""
    case = CASES[name]
    if attention not in case.attentions:
        pytest.skip(f"the reference of {name} has no {attention} attention")
    model = subjects.hooked(case, dtype, attention)
    for what, inputs in batches(case).items():
        x = model.encode(**inputs)
        expected = subjects.expected(case, what, dtype, attention)
        found = difference(case, model, x, expected)
        assert found is None, f"{what}: {found}"
        watched, cache = model.run_with_cache(x, names_filter=lambda name: True)
        assert torch.equal(watched, model(x)), what
        shapes = model.hook_shapes()
        always = {n for n in shapes if not n.startswith("audio.") and n != "hook_audio_embed"}
        assert set(cache.keys()) - set(model.aliases) == (always if not x.clips else set(shapes))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_every_point_of_the_encoder(
    subjects: Subjects, name: str, dtype: torch.dtype, attention: str
) -> None:
    """Bit by bit what Whisper's layers hold in the reference, padding included."""
    case = CASES[name]
    model = subjects.hooked(case, dtype, attention)
    is_hooked = model.audio is not None and model.audio.hooked_encoder is not None
    assert is_hooked != (name in OPAQUE)
    family = load_family(FAMILIES[model.cfg.original_architecture])
    assert family.card.is_encoder_hooked in (is_hooked, None)
    if not is_hooked or attention not in case.attentions:
        pytest.skip(f"the encoder of {name} has no points inside, or no {attention} attention")
    for what in (UNEQUAL, "one long clip"):
        inputs = batches(case)[what]
        reference = subjects.reference(case, dtype, attention)
        with encoder_recorded(layers_that_run(partial(reference.run, inputs))) as expected:
            reference.run(inputs)
        x = model.encode(**inputs)
        inside = [n for n in model.hook_dict if n.startswith("audio.encoder.blocks.")]
        inside = [n for n in inside if model.unfireable(n) is None]
        _, cache = model.run_with_cache(x, names_filter=["audio.encoder.hook_embed", *inside])
        found = cache.cache_dict
        eager_only = {n for n in inside if n.endswith(("hook_attn_scores", "hook_pattern"))}
        missing = {*inside} - {*expected}
        assert missing == (set() if attention == "eager" else eager_only), what
        for point, theirs in expected.items():
            if point in found and not point.endswith(CLOSE):
                assert torch.equal(found[point], theirs), f"{what}: {point}"
            elif point in found:
                close = OTHER_KERNEL[dtype]
                torch.testing.assert_close(found[point], theirs, atol=close, rtol=close)


@pytest.mark.parametrize("name", [name for name in CASES if name not in OPAQUE])
def test_a_waveform_has_a_gradient(subjects: Subjects, name: str) -> None:
    """Its features are the extractor's, and what is heard of them depends on the samples."""
    model = subjects.hooked(CASES[name])
    assert model.audio is not None
    assert model.audio.hooked_encoder is not None
    cfg = model.audio.hooked_encoder.cfg
    extractor = WhisperFeatureExtractor(feature_size=cfg.n_mels)
    if not isinstance(model.audio.hooked_encoder, ChunkedEncoder):
        # Windows of the tiny encoder's length.
        extractor.n_samples = 2 * cfg.n_ctx * extractor.hop_length
        extractor.chunk_length = extractor.n_samples / extractor.sampling_rate
    samples = torch.randn(23_456, generator=torch.Generator().manual_seed(0)).div(10)
    if getattr(model.audio, "d_beats", 0):
        pytest.skip("it also reads BEATs features, which nothing here makes")
    waveform = Waveform(samples=samples.numpy(), sampling_rate=16_000, notes=(), name="")
    plain, sizes = model.audio.windows_of(waveform, extractor)
    samples = samples.clone().requires_grad_()
    found, same = windows_with_gradient(model.audio, extractor, waveform, samples)
    assert torch.equal(found, plain)
    assert [*same] == [*sizes]
    clip = model.audio.clip(found, same)
    model.audio.embed_clips([clip])[0].square().sum().backward()
    assert samples.grad is not None
    assert torch.isfinite(samples.grad).all()
    # Some families cut at the encoder's window.
    assert (samples.grad[:15_000] != 0).all()


@pytest.mark.parametrize("name", [name for name in CASES if name not in OPAQUE])
@torch.no_grad()
def test_sweeps_and_paths_in_the_encoder(subjects: Subjects, name: str) -> None:
    """Clips of several windows, chunks, masks, padding that is read: as whole runs have them."""
    model = subjects.hooked(CASES[name])
    if name.startswith("DeSTA"):
        with pytest.raises(InputError, match="the connector reads the encoder's blocks below"):
            model.towards("encoder")
        return
    encoder = model.towards("encoder")
    sent, end = f"{encoder.path[0]}.hook_mlp_out", f"{encoder.path[-1]}.hook_resid_post"
    for what in (UNEQUAL, "one long clip"):
        x = model.encode(**batches(CASES[name])[what])
        limit = rounding(model, x)
        for site in ("resid_pre", "v", "mlp_out") if what == UNEQUAL else ("v",):
            fast, _ = both(
                encoder, x, "zero", LAST, site=site, places=["audio", ("audio", "padding"), 3]
            )
            assert np.abs(fast.effect).max((-1, -2)).min() > 1e-4
        if what == UNEQUAL and len(x) > 1 and name.startswith("Ultravox"):
            # Rows that pad the shorter clip run, and nothing may be written that attends to them.
            with pytest.raises(InputError, match="padded differently"):
                patch(encoder, x[[1]], x[[0]], LAST, site="pattern", places=[3])
        quieter = tuple(replace(clip, features=clip.features / 2) for clip in x.clips)
        y = replace(x, clips=quieter)
        base, donor = (model.run_with_cache(one, names_filter=sent)[1][sent] for one in (x, y))
        add = (end, lambda value, hook, change=donor - base: value + change)
        expected = LAST.function(model.run_with_hooks(x, fwd_hooks=[add]))
        found = path_patch(
            model, x, y, LAST, sent, f"{model.path[0]}.hook_resid_pre", places=["all"]
        )
        np.testing.assert_allclose(found.values[0, 0, 0], expected.numpy(), rtol=0, atol=limit)
        assert moved(found) > 1e-3


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_every_layout_gives_the_same_model(subjects: Subjects, name: str, tmp_path: Path) -> None:
    case = CASES[name]
    x = subjects.hooked(case).encode(**batches(case)[UNEQUAL])
    expected = subjects.hooked(case)(x)
    for layout, rename in case.layouts.items():
        folder = edited(
            subjects.folder(case),
            tmp_path / layout,
            lambda tensors, rename=rename: {rename(key): t for key, t in tensors.items()},
        )
        assert tensors_of(folder).keys() != tensors_of(subjects.folder(case)).keys(), layout
        assert torch.equal(subjects.load(case, folder)(x), expected), layout
    stored = subjects.folder(case, torch.bfloat16)
    assert subjects.load(case, stored).cfg.dtype == torch.bfloat16


ROUNDED_TWICE = {
    "SALMONN": "its update is added to weights of the dtype that they are loaded in",
}


@pytest.mark.parametrize("name", [name for name in CASES if name not in ROUNDED_TWICE])
@torch.no_grad()
def test_cast_after_loading(subjects: Subjects, name: str) -> None:
    """As if loaded in that dtype: what is kept in fp32 stays so."""
    case = CASES[name]
    x = subjects.hooked(case).encode(**batches(case)[UNEQUAL])
    expected = subjects.hooked(case, torch.bfloat16)(x)
    model = subjects.load(case, subjects.folder(case))
    model(x)
    assert torch.equal(model.to(torch.bfloat16)(x), expected)
    assert model.cfg.dtype == torch.bfloat16


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_greedy_generation(subjects: Subjects, name: str) -> None:
    """The reference's tokens, with and without a cache."""
    case = CASES[name]
    model = subjects.hooked(case)
    reference = subjects.reference(case, torch.float32, "sdpa")
    for what in (UNEQUAL, "text only"):
        inputs = batches(case)[what]
        expected = reference.greedy(inputs, GREEDY)
        assert expected.shape == (len(inputs["input_ids"]), GREEDY)
        for use_cache in (True, False):
            found = model.generate(
                model.encode(**inputs), GREEDY, return_type="tokens", do_sample=False,
                use_past_kv_cache=use_cache, eos_token_id=None,
            )  # fmt: skip
            assert torch.equal(found, expected), (what, use_cache)


def weights_of(folder: Path) -> Path:
    """The one file of weights."""
    return next((file for file in folder.glob("*.pth")), folder / "model.safetensors")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    file = weights_of(folder)
    if file.suffix == ".pth":
        stored = torch.load(file, weights_only=True)
        return dict(stored.get("model", stored))
    return dict(load_file(file))


def edited(folder: Path, out: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of a checkpoint with other tensors."""
    out.mkdir()
    weights = weights_of(folder)
    for file in folder.iterdir():
        if file != weights and file.is_file():
            (out / file.name).write_bytes(file.read_bytes())
        elif file.is_dir():
            (out / file.name).symlink_to(file)
    tensors = change(tensors_of(folder))
    if weights.suffix == ".pth":
        is_nested = "model" in torch.load(weights, weights_only=True)
        torch.save({"model": tensors} if is_nested else tensors, out / weights.name)
    else:
        save_file(tensors, out / weights.name, metadata={"format": "pt"})
    return out


def without(case: Case, folder: Path, name: str, out: Path) -> tuple[Path, dict[str, str]]:
    """The checkpoint without one tensor, or without one of a component (``component/name``)."""
    part, slash, own = name.rpartition("/")
    broken = edited(
        Path(case.components(folder)[part]) if slash else folder,
        out,
        lambda tensors: {k: v for k, v in tensors.items() if k != own},
    )
    return (folder, {part: str(broken)}) if slash else (broken, {})


def declared_untied(case: Case, folder: Path, out: Path) -> tuple[Path, dict[str, str]]:
    """The checkpoint or its language model without a head, under a config that ties none."""
    parts = case.components(folder)
    part = "text_model" if "text_model" in parts else None
    broken = edited(Path(parts[part]) if part else folder, out, lambda tensors: tensors)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return (folder, {part: str(broken)}) if part else (broken, {})


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_that_does_not_fit_is_refused(
    subjects: Subjects, name: str, tmp_path: Path
) -> None:
    case = CASES[name]
    folder = subjects.folder(case)
    faults = {
        "a key left over": (
            edited(folder, tmp_path / "more", lambda t: t | {"adapter.weight": torch.ones(3)}),
            {},
        )
    }
    if case.is_tied:
        faults["no head"] = declared_untied(case, folder, tmp_path / "no head")
    else:
        faults["no head"] = without(case, folder, case.head, tmp_path / "no head")
    if case.bias is not None:
        faults["no bias"] = without(case, folder, case.bias, tmp_path / "no bias")
    for broken, parts in faults.values():
        with pytest.raises(ConversionError, match="tensors do not fit the model"):
            subjects.load(case, broken, parts)


def swap_gate_and_up(model: HookedALM) -> None:
    mlp = model.blocks[1].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


def forget_a_norm(model: HookedALM) -> None:
    model.blocks[1].ln2.weight.data.fill_(1)


def nudge_the_front_end(model: HookedALM) -> None:
    """One element of its last parameter, by about 16 units in the last place."""
    *_, last = (p for p in model.audio.parameters() if p.is_floating_point())
    last.data.view(-1)[-1] *= 1 + 2**-19


def skip_a_norm(model: HookedALM) -> None:
    """The last of the front-end: its projector's, or the encoder's on the way to it."""
    norms = [name for name, m in model.audio.named_modules() if type(m).__name__.endswith("Norm")]
    owner, _, leaf = norms[-1].rpartition(".")
    setattr(model.audio.get_submodule(owner), leaf, torch.nn.Identity())


FAULTS = {
    "a norm of the front-end skipped": skip_a_norm,
    "gate and up swapped": swap_gate_and_up,
    "a norm's scale forgotten": forget_a_norm,
    "one number of the front-end": nudge_the_front_end,
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_comparison_notices_faults(subjects: Subjects, name: str) -> None:
    case = CASES[name]
    expected = subjects.expected(case, UNEQUAL)
    for what, fault in {**FAULTS, **case.faults}.items():
        model = subjects.load(case, subjects.folder(case))
        x = model.encode(**batches(case)[UNEQUAL])
        assert difference(case, model, x, expected) is None
        fault(model)
        x = model.encode(**batches(case)[UNEQUAL])
        assert difference(case, model, x, expected) is not None, what
    shifted = [[[(a - 1, b - 1) for a, b in clip] for clip in clips] for clips in x.spans.clips]
    model = subjects.hooked(case)
    x = model.encode(**batches(case)[UNEQUAL])
    x = replace(x, spans=replace(x.spans, clips=shifted))
    if model.audio.tokens.placeholder is None:
        assert difference(case, model, x, expected) is not None, "audio shifted by one"
    else:
        with pytest.raises(InputError, match="placeholders"):
            model(x)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_spans_say_where_the_audio_is(subjects: Subjects, name: str) -> None:
    """The audio's embeddings are the clips', and the readout is never audio."""
    case = CASES[name]
    model = subjects.hooked(case)
    x = model.encode(**batches(case)[UNEQUAL])
    _, cache = model.run_with_cache(x, names_filter=["hook_audio_embed", "hook_embed"])
    assert [sum(b - a for a, b in clip) for row in x.spans.clips for clip in row] == [
        clip.n_tokens for clip in x.clips
    ]
    for row, clip in enumerate(x.clips):
        positions = [p for a, b in x.spans.clips[row][0] for p in range(a, b)]
        assert positions == x.spans.positions("audio", row)
        changed = (cache["hook_embed"][row] - cache["hook_embed"].roll(1, 1)[row]).abs().sum(-1)
        assert (changed[positions] > 0).all()
        assert not cache["hook_audio_embed"][row, clip.n_tokens :].any()
    assert not (x.spans.mask("audio") & x.spans.mask("readout")).any()
    covered = sum(
        x.spans.mask(s).int()
        for s in ("audio", "audio_struct", "text", "struct", "sink", "readout")
    )
    assert torch.equal(covered, x.attention_mask.int())


@pytest.mark.parametrize("name", CASES)
def test_positions_by_duration(name: str) -> None:
    case = CASES[name]
    assert case.tokens_of is not None
    assert {s: case.tokens_of(s) for s in case.seconds} == dict(case.seconds)
    assert {*case.seconds} >= {1, 5, 10, 30, 60}


@pytest.mark.parametrize("name", CASES)
def test_verify(subjects: Subjects, name: str) -> None:
    case = CASES[name]
    folder = subjects.folder(case)
    result = verify(str(folder), components=case.components(folder))
    assert result.passed
    if isinstance(result, Accounting):
        assert "no HF class" in result.table()
    else:
        assert result.is_equal


@pytest.mark.parametrize("name", ["Kimi-Audio", "Ultravox 0.4"])
@torch.no_grad()
def test_knockout_and_enrichment_equal_the_plain_loop(subjects: Subjects, name: str) -> None:
    """On every head of the model, in rows of other lengths."""
    case = CASES[name]
    model = subjects.hooked(case)
    x = model.encode(**batches(case)[UNEQUAL])
    metric = LogitDiff(answer=5, other=11)
    for one in (model, model.towards("audio")) if model.cfg.branches else (model,):
        states = residual_rows(one, x)[:2, :, 0]
        for sweep in (
            partial(knock_out, keys={"audio": "audio", "text": "text"}, layers=[0, (1, 2)]),
            partial(enrich, states=states, mode="average"),
        ):
            fast, plain = (sweep(one, x, metric=metric, engine=e) for e in ("fast", "hooks"))
            assert abs(fast.values - fast.base).max() > 1e-3
            assert abs(fast.values - plain.values).max() < FAST_ENGINE[torch.float32]


PATCHED: tuple[tuple[Site, Any], ...] = (
    ("resid_pre", ["audio", "readout"]),
    ("z", ["readout"]),
    ("v", ["audio"]),
    ("mlp_out", ["text"]),
)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_sweeps_and_paths_equal_the_plain_loop(subjects: Subjects, name: str) -> None:
    """Audio swapped for another of the same length, on every head of the model."""
    case = CASES[name]
    model = subjects.hooked(case)
    _, middling, _ = case.clips
    base = model.encode(**case.inputs([[middling]], [9]))
    donor = model.encode(**case.inputs([[middling], [middling]], [9, 9]))[1]
    assert donor.shape == base.shape
    metric = LogitDiff(answer=5, other=11)
    for one in (model, model.towards("audio")) if model.cfg.branches else (model,):
        for site, places in PATCHED:
            heads = "each" if site in ("z", "v") else None
            results = [
                patch(one, base, donor, metric, site=site, places=places, heads=heads, engine=e)
                for e in ("fast", "hooks")
            ]
            assert abs(results[0].values - results[0].base).max() > 1e-3, site
            assert abs(results[0].values - results[1].values).max() < FAST_ENGINE[torch.float32], (
                site
            )
        writer, reader = one.path[0], one.path[-1]
        results = [
            path_patch(
                one, base, donor, metric,
                f"{writer}.attn.hook_z[*]", f"{reader}.attn.hook_q_input[*]", engine=e,
            )
            for e in ("fast", "hooks")
        ]  # fmt: skip
        assert abs(results[0].values - results[1].values).max() < FAST_ENGINE[torch.float32]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_joined_inputs_are_read_as_they_are_alone(subjects: Subjects, name: str) -> None:
    """Of other lengths, with and without clips; rows taken from a batch join to the same batch."""
    case = CASES[name]
    model = subjects.hooked(case)
    some, long, text = (model.encode(**batches(case)[what]) for what in BATCHES)
    again = ALMInput.joined([some[0], some[1]])
    for field in ("tokens", "attention_mask", "position_ids", "text_tokens"):
        ours, theirs = getattr(again, field), getattr(some, field)
        assert ours is theirs is None or torch.equal(ours, theirs)
    assert (again.spans, again.clips, again.clip_rows) == (some.spans, some.clips, some.clip_rows)

    together = ALMInput.joined([long, some, text])
    assert len(together) == 5
    together_run = run_ours(model, together)["logits"]
    for first, x in ((0, long), (1, some), (3, text)):
        rows = range(first, first + len(x))
        moved = [together.spans.mask("audio")[row, -x.shape[1] :] for row in rows]
        assert torch.equal(torch.stack(moved), x.spans.mask("audio"))
        apart = [run_ours(model, x[row])["logits"][0] for row in range(len(x))]
        error = (together_run[rows, -x.shape[1] :] - torch.stack(apart))[x.attention_mask.bool()]
        assert error.abs().max() < ENCODER_BATCH[torch.float32]
    # Encoded together they are others, where the published model lets them.
    beside = run_ours(model, replace(together, hears_apart=False))["logits"]
    changed = (beside - together_run)[together.attention_mask.bool()].abs().max()
    assert (changed > 0.01) == model.audio.depends_on_longest
