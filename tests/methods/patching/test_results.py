"""Labelled results of a sweep: parts, recovery, means, tables and pictures."""

from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest

from engine_runs import BASE, OTHER
from hooked_alm import HookedALM, InputError
from hooked_alm.methods.patching.alignment import Window
from hooked_alm.methods.patching.metrics import LogitDiff, Logits
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.patching.results import PatchResult

WINDOW = Window(0.0, 0.1)
PLACES = ("audio", ("text", "readout"), WINDOW)


def example(**changes: Any) -> PatchResult:
    """Two layers, three places, four examples; the last has no effect to recover."""
    values = np.arange(24.0).reshape(2, 3, 4)
    return PatchResult(**{
        "axes": {"layer": (1, (2, 3)), "place": PLACES, "example": (0, 1, 2, 3)},
        "values": values, "base": np.array([0.0, 1.0, 2.0, 3.0]),
        "donor": np.array([10.0, 21.0, -2.0, 3.0]), "site": "z", "mode": "replace",
        "engine": "fast", "length_ratios": ({"audio": 1.0},) * 4, **changes,
    })  # fmt: skip


def labelled() -> PatchResult:
    values = np.arange(48.0).reshape(2, 3, 4, 2)
    return example(
        axes={"layer": (1, (2, 3)), "place": PLACES, "example": (0, 1, 2, 3),
              "label": ("sad", "glad")},
        values=values, base=values[0, 0], donor=values[1, 2] + 1,
    )  # fmt: skip


def test_effects_and_recovery() -> None:
    result = example()
    assert result.effect[1, 2].tolist() == [20.0, 20.0, 20.0, 20.0]
    assert result.effect[0, 1, 2] == 6.0 - 2.0
    assert result.total_effect.tolist() == [10.0, 20.0, -4.0, 0.0]
    assert result.recovery[1, 2, :3].tolist() == [2.0, 1.0, -5.0]
    assert np.isnan(result.recovery[..., 3]).all()
    assert not np.isnan(result.recovery[..., :3]).any()
    assert result.n_undefined == 1
    assert example(donor=np.full(4, np.nan)).n_undefined == 4, "the donor is not a run"
    assert np.isnan(example(donor=np.full(4, np.nan)).recovery).all()
    # Per label where there are labels.
    result = labelled()
    assert result.n_undefined == 0
    assert result.recovery.shape == (2, 3, 4, 2)


def test_select() -> None:
    result = example()
    part = result.select(layer=(2, 3))
    assert list(part.axes) == ["place", "example"]
    assert np.array_equal(part.values, result.values[1])
    both = result.select(layer=1, place=WINDOW)
    assert list(both.axes) == ["example"]
    assert both.values.tolist() == [8.0, 9.0, 10.0, 11.0]
    assert (both.site, both.mode, both.engine) == ("z", "replace", "fast")
    assert both.length_ratios == result.length_ratios
    assert np.array_equal(both.recovery, result.recovery[0, 2], equal_nan=True)
    place = labelled().select(place=("text", "readout"))
    assert np.array_equal(place.values, labelled().values[:, 1])
    with pytest.raises(InputError, match=r"selecting layer=2: this result has layer \[1, \(2, 3\)"):
        result.select(layer=2)
    with pytest.raises(InputError, match="selecting head=0: this result has layer"):
        result.select(head=0)
    for axis in ("example", "label"):
        with pytest.raises(InputError, match="index `values` for examples and labels"):
            labelled().select(**{axis: 0})


def test_means() -> None:
    """Over examples; undefined recoveries are left out and counted."""
    result = example()
    effect = result.mean()
    np.testing.assert_allclose(effect.mean, result.effect.mean(axis=-1))
    assert effect.mean.shape == (2, 3)
    assert np.isnan(effect.low).all(), "too few examples for an interval"
    many = example(
        axes={"layer": (1, (2, 3)), "place": PLACES, "example": tuple(range(8))},
        values=np.random.default_rng(0).normal(size=(2, 3, 8)), base=np.zeros(8), donor=np.ones(8),
        length_ratios=({"audio": 1.0},) * 8,
    )  # fmt: skip
    effect = many.mean()
    assert (effect.low <= effect.mean).all()
    assert (effect.mean <= effect.high).all()
    np.testing.assert_allclose(result.mean("values").mean, result.values.mean(-1))
    recovery = result.mean("recovery", n_resamples=1000)
    np.testing.assert_allclose(recovery.mean, result.recovery[..., :3].mean(-1))
    assert labelled().mean().mean.shape == (2, 3, 2)
    with pytest.raises(InputError, match="NaN"):
        example(values=np.full((2, 3, 4), np.nan)).mean()
    again = [many.mean("values", seed=seed, n_resamples=20) for seed in (3, 3, 4)]
    assert np.array_equal(again[0].low, again[1].low)
    assert not np.array_equal(again[0].low, again[2].low)


def test_table() -> None:
    """A row per cell and example, at its own coordinates."""
    table = labelled().to_dataframe()
    assert list(table.columns) == [
        "layer", "place", "example", "label", "value", "base", "donor", "effect", "recovery",
    ]  # fmt: skip
    assert len(table) == 48
    row = table[
        (table.layer == "2 + 3") & (table.place == "text + readout") & (table.example == 2)
        & (table.label == "glad")
    ]  # fmt: skip
    result = labelled()
    assert row.value.tolist() == [result.values[1, 1, 2, 1]]
    assert row.base.tolist() == [result.base[2, 1]]
    assert row.donor.tolist() == [result.donor[2, 1]]
    assert row.effect.tolist() == [result.effect[1, 1, 2, 1]]
    assert row.recovery.tolist() == [result.recovery[1, 1, 2, 1]]
    assert len(example().select(layer=1, place="audio").to_dataframe()) == 4


@pytest.fixture
def axes() -> Any:
    yield plt.subplots()[1]
    plt.close("all")


def test_picture(axes: Any) -> None:
    """The mean over examples: first axis up, second to the right, zero in the middle."""
    result = example()
    assert result.plot(ax=axes) is axes
    (image,) = axes.images
    np.testing.assert_array_equal(image.get_array(), result.effect.mean(-1))
    limit = np.abs(result.effect.mean(-1)).max()
    assert image.get_clim() == (-limit, limit)
    assert image.origin == "lower"
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["1", "2 + 3"]
    assert axes.get_xticklabels()[1].get_text() == "text + readout"
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("layer", "place")
    assert axes.get_title() == "z: effect, mean of 4"


def test_pictures_of_what_is_asked(axes: Any) -> None:
    result = labelled()
    result.plot("values", label="glad", ax=axes)
    np.testing.assert_array_equal(axes.images[-1].get_array(), result.values.mean(2)[..., 1])
    result.plot("values", ax=axes)
    np.testing.assert_array_equal(axes.images[-1].get_array(), result.values.mean(2)[..., 0])
    example().plot("recovery", ax=axes)
    np.testing.assert_allclose(axes.images[-1].get_array(), np.nanmean(example().recovery, axis=-1))
    assert axes.images[-1].get_clim() == (-1, 1)
    one_line = example().select(layer=1)
    assert one_line.plot().images[0].get_array().shape == (3, 1)
    cells = np.zeros((2, 3, 2, 4))
    cubes = example(
        axes={"layer": (0, 1), "head": (0, 1, 2), "place": ("audio", "text"),
              "example": (0, 1, 2, 3)},
        values=cells,
    )  # fmt: skip
    with pytest.raises(InputError, match="2 layers, 3 heads, 2 places"):
        cubes.plot()
    assert cubes.select(place="text").plot().images[0].get_array().shape == (2, 3)


@pytest.mark.parametrize("engine", ["fast", "hooks"])
def test_axes_of_sweeps(gqa: HookedALM, engine: Any) -> None:
    """Coordinates are what was asked for, and cells lie where they say."""
    base, donor = gqa.encode(**BASE), gqa.encode(**OTHER)
    options: dict[str, Any] = {"site": "z", "engine": engine}
    result = patch(
        gqa, base, donor, Logits([7, 9]), layers=[3, (0, 1)], heads=[5, (0, 2)],
        places=PLACES, **options,
    )  # fmt: skip
    assert result.axes == {
        "layer": (3, (0, 1)), "head": (5, (0, 2)), "place": PLACES, "example": (0, 1),
        "label": (0, 1),
    }  # fmt: skip
    assert result.values.shape == (2, 2, 3, 2, 2)
    assert result.base.shape == result.donor.shape == (2, 2)
    assert result.engine == engine
    alone = patch(
        gqa, base, donor, Logits([7, 9]), layers=[(0, 1)], heads=[(0, 2)], places=[PLACES[1]],
        **options,
    )  # fmt: skip
    part = result.select(layer=(0, 1), head=(0, 2), place=PLACES[1])
    np.testing.assert_allclose(part.values, alone.values[0, 0, 0], atol=1e-5)
    assert np.abs(part.effect).max() > 1e-3
    whole = patch(gqa, base, donor, LogitDiff(7, 9), places=["text"], engine=engine)
    assert whole.axes == {"layer": (0, 1, 2, 3), "place": ("text",), "example": (0, 1)}
    assert whole.length_ratios == ({"text": 1.0}, {"text": 1.0})
    assert whole.site == "resid_post"


def test_a_contrast_is_of_the_labels_that_each_example_names() -> None:
    rng = np.random.default_rng(0)
    values, base, donor = (rng.normal(size=size) for size in ((3, 2, 3), (2, 3), (2, 3)))
    result = PatchResult(
        axes={"layer": (0, 1, 2), "example": (0, 1), "label": ("a", "b", "c")}, values=values,
        base=base, donor=donor, site="z", mode="replace", engine="fast", noise=np.abs(base),
    )  # fmt: skip
    found = result.contrast(["a", "c"], ["b", "a"])
    assert found.axes == {"layer": (0, 1, 2), "example": (0, 1)}
    for layer in range(3):
        expected = [
            values[layer, 0, 0] - values[layer, 0, 1],
            values[layer, 1, 2] - values[layer, 1, 0],
        ]
        assert found.values[layer].tolist() == expected
        gone = [base[0, 0] - base[0, 1], base[1, 2] - base[1, 0]]
        assert found.effect[layer].tolist() == [a - b for a, b in zip(expected, gone, strict=True)]
    assert found.donor.tolist() == [donor[0, 0] - donor[0, 1], donor[1, 2] - donor[1, 0]]
    assert found.noise is not None
    assert found.noise.tolist() == result.noise_between_labels.tolist()
