"""Patching against hooks written out position by position, by either engine."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_alm import ALMInput, HookedALM, InputError
from hooked_alm.methods.patching.metrics import Logits, OnLogits
from hooked_alm.methods.patching.patch import PatchMode, patch
from hooked_alm.methods.patching.results import PatchResult
from hooked_alm.methods.patching.warping import dtw_indices
from hooked_alm.points import Site
from tiny import N_LAYERS, PLACEHOLDER, TinyModels, hf_inputs
from tolerances import ENGINE, PADDED_ROW, RESAMPLED_DONOR

NAMES = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_post": "blocks.{}.hook_resid_post",
    "z": "blocks.{}.attn.hook_z",
}
SITES: tuple[Site, ...] = ("resid_pre", "resid_post", "z")
BASE = hf_inputs([[63], [23]], [9, 14])
WIDTH = BASE["input_ids"].shape[1]
# The same clip lengths, other text lengths: base rows have 0 and 5 pads, donor rows 7 and 0.
DONOR = hf_inputs([[63], [23]], [9, 26], seed=2)
# Clips exchanged: 16 and 6 positions against 6 and 16.
STRETCHED = hf_inputs([[23], [63]], [9, 14], seed=3)


def whole(logits: Tensor) -> Tensor:
    """A metric that loses nothing: all logits of all positions of the base, pads included."""
    return logits[:, -WIDTH:].flatten(1)


WHOLE = OnLogits(whole)


def swept(model: HookedALM, base: ALMInput, donor: ALMInput, **options: Any) -> PatchResult:
    """The plain loop's result, which is bit-identical; the fast engine's is close, pads apart."""
    plain, fast = (
        patch(model, base, donor, WHOLE, engine=engine, **{"places": ["audio"], **options})
        for engine in ("hooks", "fast")
    )
    limit = ENGINE[model.cfg.dtype] * np.abs(plain.base).max()
    real = base.attention_mask.bool().numpy()
    for ours, theirs in ((fast.values, plain.values), (fast.base, plain.base)):
        at_reals = [
            part.reshape(*part.shape[:-1], WIDTH, -1)[..., real, :] for part in (ours, theirs)
        ]
        np.testing.assert_allclose(*at_reals, rtol=0, atol=limit)
    return plain


def is_exactly(found: np.ndarray, expected: Tensor) -> bool:
    return np.array_equal(found, expected.double().numpy())


def audio_positions(inputs: dict[str, Tensor], row: int) -> list[int]:
    return (inputs["input_ids"][row] == PLACEHOLDER).nonzero().flatten().tolist()


def recorded(model: HookedALM, x: ALMInput, name: str) -> Tensor:
    """One activation, by a hook of our own."""
    kept: list[Tensor] = []
    model.run_with_hooks(x, fwd_hooks=[(name, lambda value, hook: kept.append(value.clone()))])
    return kept[0]


def by_hand(
    model: HookedALM,
    base: ALMInput,
    site: str,
    layer: int,
    cells: list[tuple[int, int, Tensor]],
    *,
    heads: list[int] | None = None,
    mode: str = "replace",
    c: float = 1.0,
) -> Tensor:
    """Logits with one write per (row, position, value of the donor there)."""

    def write(value: Tensor, hook: Any) -> Tensor:
        out = value.clone()
        for row, position, theirs in cells:
            for head in range(value.shape[2]) if site == "z" else [None]:
                if heads is not None and head not in heads:
                    continue
                at = (row, position) if head is None else (row, position, head)
                d = theirs if head is None else theirs[head]
                a = value[at]
                out[at] = {"replace": d, "interpolate": (1 - c) * a + c * d, "add": a + c * d}[mode]
        return out

    return model.run_with_hooks(base, fwd_hooks=[(NAMES[site].format(layer), write)])


def one_cell(sweep: PatchResult) -> Tensor:
    return torch.tensor(sweep.values[(0,) * (sweep.values.ndim - 2)]).float()


@pytest.mark.parametrize("variant", ["gqa", "mha", "mqa, sliding"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_sweep_is_the_loop_by_hand(tiny_models: TinyModels, variant: str, attention: str) -> None:
    """Two rows, padded differently in base and donor, every site, block and span."""
    model = tiny_models.hooked(variant, attention=attention)
    base, donor = model.encode(**BASE), model.encode(**DONOR)
    spans = {
        "audio": [audio_positions(BASE, row) for row in (0, 1)],
        "readout": [[26], [26]],
    }
    spans["audio, readout"] = [spans["audio"][row] + [26] for row in (0, 1)]
    groups: list[Any] = ["audio", "readout", ("audio", "readout")]
    logits, donor_logits = whole(model(base)), whole(model(donor))
    for site in SITES:
        sweep = swept(model, base, donor, places=groups, site=site)
        assert sweep.axes["layer"] == tuple(range(N_LAYERS))
        assert sweep.axes["place"] == ("audio", "readout", ("audio", "readout"))
        assert sweep.values.shape == (N_LAYERS, 3, 2, logits.shape[1])
        assert is_exactly(sweep.base, logits)
        assert is_exactly(sweep.donor, donor_logits)
        assert sweep.length_ratios == ({"audio": 1.0, "readout": 1.0},) * 2
        for layer in range(N_LAYERS):
            theirs = recorded(model, donor, NAMES[site].format(layer))
            for i, rows in enumerate(spans.values()):
                cells = [
                    # Audio lies before the longer text, the readout at the end of both.
                    (row, pos, theirs[row, audio_positions(DONOR, row)[k] if k < n else -1])
                    for row, positions in enumerate(rows)
                    for n in [len(spans["audio"][row]) if i != 1 else 0]
                    for k, pos in enumerate(positions)
                ]
                expected = whole(by_hand(model, base, site, layer, cells))
                assert is_exactly(sweep.values[layer, i], expected), (site, layer, i)
                assert not torch.equal(expected, logits), "the patch does something"


@pytest.mark.parametrize("heads", [None, [4], [5, 0, 3]])
@pytest.mark.parametrize("variant", ["gqa", "mha"])
@pytest.mark.parametrize(
    ("mode", "c"), [("replace", 1.0), ("interpolate", 0.3), ("add", -0.7), ("add", 2.0)]
)
@torch.no_grad()
def test_modes_and_heads(
    tiny_models: TinyModels, variant: str, mode: PatchMode, c: float, heads: list[int] | None
) -> None:
    model = tiny_models.hooked(variant)
    base, donor = model.encode(**BASE), model.encode(**DONOR)
    for site in SITES if heads is None else ("z",):
        theirs = recorded(model, donor, NAMES[site].format(2))
        cells = [
            (row, ours, theirs[row, other])
            for row in (0, 1)
            for ours, other in zip(
                audio_positions(BASE, row), audio_positions(DONOR, row), strict=True
            )
        ]
        sweep = swept(
            model, base, donor, site=site, layers=[2], mode=mode, coefficient=c,
            heads=None if heads is None else [tuple(heads)],
        )  # fmt: skip
        logits = by_hand(model, base, site, 2, cells, heads=heads, mode=mode, c=c)
        assert torch.equal(one_cell(sweep), whole(logits))
        assert not is_exactly(sweep.base, one_cell(sweep))


@pytest.mark.parametrize("site", SITES)
@torch.no_grad()
def test_ends_of_the_coefficient(gqa: HookedALM, site: Site) -> None:
    base, donor = gqa.encode(**BASE), gqa.encode(**DONOR)

    def cell(**options: Any) -> Tensor:
        return one_cell(swept(gqa, base, donor, site=site, layers=[1], **options))

    unpatched = whole(gqa(base))
    for mode in ("interpolate", "add"):
        assert torch.equal(cell(mode=mode, coefficient=0.0), unpatched)
    assert torch.equal(cell(mode="interpolate", coefficient=1.0), cell())
    assert torch.equal(cell(mode="replace", coefficient=0.5), cell()), "replace has no strength"
    assert not torch.equal(cell(), unpatched)


@pytest.mark.parametrize("variant", ["gqa", "mha, sliding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_self_patch_is_exactly_nothing(
    tiny_models: TinyModels, variant: str, dtype: torch.dtype
) -> None:
    model = tiny_models.hooked(variant, dtype)
    base = model.encode(**BASE)
    spans = ["audio", "text", ("audio", "text", "readout", "sink")]
    for options in ({"site": site} for site in SITES):
        assert not swept(model, base, base, places=spans, **options).effect.any()
    assert not swept(model, base, base, places=spans, site="z", heads=[(1, 4)]).effect.any()


@torch.no_grad()
def test_rows_with_different_alignments(gqa: HookedALM) -> None:
    """Row 0 takes 6 donor positions for its 16, row 1 takes 16 for its 6."""
    base, donor = gqa.encode(**BASE), gqa.encode(**STRETCHED)
    for site, heads in (("resid_pre", None), ("resid_post", None), ("z", None), ("z", [3, 5])):
        theirs = recorded(gqa, donor, NAMES[site].format(1))
        cells = []
        for row in (0, 1):
            ours, other = audio_positions(BASE, row), audio_positions(STRETCHED, row)
            for k, pos in enumerate(ours):
                at = torch.linspace(0, len(other) - 1, len(ours), dtype=torch.float64)[k].item()
                low = min(int(at), len(other) - 2)
                weight = at - low
                a, b = theirs[row, other[low]], theirs[row, other[low + 1]]
                cells.append((row, pos, a + weight * (b - a)))
        sweep = swept(
            gqa, base, donor, site=site, layers=[1], policy="resample_linear",
            heads=None if heads is None else [tuple(heads)],
        )  # fmt: skip
        expected = whole(by_hand(gqa, base, site, 1, cells, heads=heads))
        # The weights are rounded to fp32 by another formula.
        torch.testing.assert_close(one_cell(sweep), expected, atol=RESAMPLED_DONOR, rtol=0)
        assert np.abs(expected.numpy() - sweep.base).max() > 1e-2
        assert sweep.length_ratios == ({"audio": 6 / 16}, {"audio": 16 / 6})


@torch.no_grad()
def test_rows_do_not_touch_each_other(gqa: HookedALM) -> None:
    base, donor = gqa.encode(**BASE), gqa.encode(**DONOR)
    both = one_cell(swept(gqa, base, donor, layers=[1]))
    swapped = swept(gqa, base[[1, 0]], donor[[1, 0]], layers=[1])
    # Not exact: a row's products depend on its place in the batch.
    tolerance = PADDED_ROW[torch.float32]
    torch.testing.assert_close(one_cell(swapped), both[[1, 0]], atol=tolerance, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    ("site", "donor_site"), [("resid_post", "resid_pre"), ("resid_pre", "resid_post")]
)
def test_donor_values_of_another_site(gqa: HookedALM, site: Site, donor_site: Site) -> None:
    base, donor = gqa.encode(**BASE), gqa.encode(**DONOR)
    sweep = swept(gqa, base, donor, site=site, donor_site=donor_site, layers=[3, 0])
    for i, layer in enumerate((3, 0)):
        theirs = recorded(gqa, donor, NAMES[donor_site].format(layer))
        cells = [
            (row, ours, theirs[row, other])
            for row in (0, 1)
            for ours, other in zip(
                audio_positions(BASE, row), audio_positions(DONOR, row), strict=True
            )
        ]
        expected = whole(by_hand(gqa, base, site, layer, cells))
        assert is_exactly(sweep.values[i, 0], expected)
    assert is_exactly(sweep.donor, whole(gqa(donor))), "the donor run is still the donor's"


@torch.no_grad()
def test_dtw_compares_the_embeddings_of_each_row(gqa: HookedALM) -> None:
    base, donor = gqa.encode(**BASE), gqa.encode(**STRETCHED)
    ours, other = (recorded(gqa, x, "hook_embed") for x in (base, donor))
    theirs = recorded(gqa, donor, NAMES["resid_post"].format(1))
    cells = []
    for row in (0, 1):
        path = dtw_indices(
            ours[row, audio_positions(BASE, row)], other[row, audio_positions(STRETCHED, row)]
        )
        for pos, k in zip(audio_positions(BASE, row), path, strict=True):
            cells.append((row, pos, theirs[row, audio_positions(STRETCHED, row)[k]]))
    sweep = swept(gqa, base, donor, layers=[1], policy="dtw")
    assert torch.equal(one_cell(sweep), whole(by_hand(gqa, base, "resid_post", 1, cells)))


@torch.no_grad()
def test_seeds_min_len_counts_from_the_start_of_both_prompts(gqa: HookedALM) -> None:
    """Its only alignment error: after a longer span, position i is another token (defect C10)."""
    base, donor = gqa.encode(**BASE), gqa.encode(**DONOR)
    theirs = recorded(gqa, donor, NAMES["resid_post"].format(1))
    # Row 0 loses its 7 pads, row 1 its 5.
    cells = [(0, pos, theirs[0, pos + 7]) for pos in audio_positions(BASE, 0)]
    cells += [(1, pos, theirs[1, pos - 5]) for pos in audio_positions(BASE, 1)]
    sweep = swept(gqa, base, donor, layers=[1], policy="min_len")
    assert torch.equal(one_cell(sweep), whole(by_hand(gqa, base, "resid_post", 1, cells)))


@torch.no_grad()
def test_metric_is_of_the_whole_run(gqa: HookedALM) -> None:
    base, donor = gqa.encode(**BASE), gqa.encode(**DONOR)
    everything = one_cell(swept(gqa, base, donor, layers=[2])).unflatten(1, (WIDTH, -1))
    few = OnLogits(lambda logits: logits[:, -1, [7, 9]])
    for metric in (few, Logits([7, 9])):
        sweep = patch(gqa, base, donor, metric, layers=[2], engine="hooks")
        assert torch.equal(one_cell(sweep), everything[:, -1, [7, 9]])
        assert is_exactly(sweep.donor, gqa(donor)[:, -1, [7, 9]])


@torch.no_grad()
def test_span_that_a_row_lacks_patches_nothing_there(gqa: HookedALM) -> None:
    """No audio in row 0, of base and donor alike."""
    base = gqa.encode(**hf_inputs([[], [23]], [12, 7]))
    donor = gqa.encode(**hf_inputs([[], [23]], [12, 7], seed=2))
    metric = OnLogits(lambda logits: logits[:, -7:].flatten(1))
    for site, heads in (("resid_post", None), ("z", None), ("z", [2])):
        for engine in ("hooks", "fast"):
            sweep = patch(
                gqa, base, donor, metric, site=site, layers=[1], heads=heads, engine=engine
            )
            cell = one_cell(sweep)
            assert is_exactly(sweep.base[0], cell[0])
            assert not is_exactly(sweep.base[1], cell[1])


def test_bad_choices(gqa: HookedALM) -> None:
    """What does not align; the rest is refused in ``test_engine``."""
    base, donor = gqa.encode(**BASE), gqa.encode(**DONOR)

    def refuse(match: str, *, donor: ALMInput = donor, span: Any = "audio", **options: Any) -> None:
        for engine in ("hooks", "fast"):
            with pytest.raises(InputError, match=match):
                patch(gqa, base, donor, WHOLE, places=[span], engine=engine, **options)

    refuse("2 base rows with 1 donor rows", donor=donor[0])
    refuse("looking up span 'speech': this input has audio", span="speech")
    refuse(
        r"span 'text' of row 1: 6 base and 12 donor positions, and policy 'error' does not apply",
        span="text",
    )
    refuse("span 'audio' of row 0: 16 base and 6 donor", donor=gqa.encode(**STRETCHED))
    no_audio = gqa.encode(**hf_inputs([[], []], [9, 14]))
    refuse("16 positions in the base and 0 in the donor", donor=no_audio, policy="truncate")
