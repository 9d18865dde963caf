"""Components of a Whisper on the way to a reference, each cell as in Hugging Face's (M-BT-4)."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from engine_runs import rounding
from hooked_alm import ALMInput, HookedALM, InputError
from hooked_alm.methods.patching.distance import donor_distance
from hooked_alm.methods.patching.metrics import LogitDiff
from hooked_alm.methods.patching.patch import DonorWrite, patch, run_pair
from whisper_components import activation, patched, sites_of_stack
from whisper_toy import LAYERS, Whispers, mel
from whisper_toy import prompts as prompts_of

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
ANSWER, OTHER = 5, 11
METRIC = LogitDiff(answer=ANSWER, other=OTHER)
INPUTS = prompts_of((9, 9))
REFERENCE = {**INPUTS, "input_features": mel(seed=7)}
"""The same words, heard in something else."""
CELLS = [(stack, site) for stack in LAYERS for site in sites_of_stack(stack)]


@pytest.fixture(scope="module")
def model(whispers: Whispers) -> HookedALM:
    return whispers.hooked()


def of_stack(model: HookedALM, stack: str) -> HookedALM:
    return model.towards("encoder") if stack == "encoder" else model


def swept(model: HookedALM, stack: str, base: ALMInput, donor: Any, **options: Any) -> Any:
    return patch(
        of_stack(model, stack), base, donor, METRIC, places=["all"], mode="interpolate", **options
    )


@pytest.mark.parametrize(("stack", "site"), CELLS)
def test_every_cell_is_that_of_hugging_face(
    whispers: Whispers, model: HookedALM, stack: str, site: Any
) -> None:
    """Of every block, head and strength, in one sweep; and how far it is moved."""
    hf, x, y = whispers.hf(), model.encode(**INPUTS), model.encode(**REFERENCE)
    heads = "each" if site.endswith("z") else None
    found = swept(model, stack, x, y, site=site, heads=heads, coefficients=ALPHAS)
    far = donor_distance(of_stack(model, stack), x, y, site=site, heads=heads, places=["all"])
    zero = donor_distance(of_stack(model, stack), x, "zero", site=site, heads=heads, places=["all"])
    assert list(found.axes)[:2] == ["coefficient", "layer"]
    assert far.shape == zero.shape == found.values.shape[1:]
    limit = rounding(model, x)
    ticks = [None] if heads is None else list(found.axes["head"])
    for layer in range(LAYERS[stack]):
        own, theirs = (activation(hf, one, stack, site, layer) for one in (INPUTS, REFERENCE))
        for i, head in enumerate(ticks):
            at = (layer,) if head is None else (layer, i)
            for k, alpha in enumerate(ALPHAS):
                logits = patched(hf, INPUTS, stack, site, layer, head, theirs, alpha)[:, -1]
                expected = (logits[:, ANSWER] - logits[:, OTHER]).numpy()
                np.testing.assert_allclose(
                    found.values[(k, *at)][0], expected, rtol=0, atol=2 * limit
                )
            some = slice(None) if head is None else head
            for value, distance in ((theirs - own, far), (own, zero)):
                part = value if head is None else value[:, :, some]
                norm = part.flatten(1).double().norm(dim=-1).numpy()
                np.testing.assert_allclose(distance[at][0], norm, rtol=1e-4)
    assert np.abs(found.effect[-1]).max() > 100 * limit


@pytest.mark.parametrize("stack", LAYERS)
def test_the_ends_and_a_reference_that_is_the_input(model: HookedALM, stack: str) -> None:
    """α = 0 changes nothing, α = 1 replaces, and towards itself nothing is moved at any α."""
    x, y = model.encode(**INPUTS), model.encode(**REFERENCE)
    limit = rounding(model, x)
    found = swept(model, stack, x, y, site="mlp_out", coefficients=ALPHAS)
    whole = patch(of_stack(model, stack), x, y, METRIC, places=["all"], site="mlp_out")
    still = swept(model, stack, x, x, site="mlp_out", coefficients=ALPHAS)
    assert np.abs(found.effect[0]).max() <= limit
    np.testing.assert_allclose(found.values[-1], whole.values, rtol=0, atol=limit)
    assert np.abs(still.effect).max() <= limit
    assert not donor_distance(of_stack(model, stack), x, x, site="mlp_out", places=["all"]).any()
    # Each strength by itself is the same.
    for k, alpha in enumerate(ALPHAS):
        alone = swept(model, stack, x, y, site="mlp_out", coefficient=alpha)
        np.testing.assert_allclose(found.values[k], alone.values, rtol=0, atol=limit)


@pytest.mark.parametrize("engine", ["fast", "hooks"])
@pytest.mark.parametrize("stack", LAYERS)
def test_runs_serve_several_sweeps(model: HookedALM, stack: str, engine: Any) -> None:
    """A base and its donors that ran once give, site by site, what they give each time anew."""
    of, x, y = of_stack(model, stack), model.encode(**INPUTS)[[0]], model.encode(**REFERENCE)
    runs, limit = run_pair(of, x, y, METRIC, ["attn_out", "mlp_out"], engine), rounding(model, x)
    for site, rows in (("attn_out", range(2)), ("mlp_out", range(1, 2))):
        base, donor = x[[0] * len(rows)], y[[*rows]]
        options: dict[str, Any] = {"site": site, "coefficients": (0.5, 1.0), "engine": engine}
        anew = swept(model, stack, base, donor, **options)
        found = swept(model, stack, base, donor, runs=runs.towards(rows), **options)
        for one in ("values", "base", "donor"):
            np.testing.assert_allclose(getattr(found, one), getattr(anew, one), rtol=0, atol=limit)
        assert np.abs(anew.effect).max() > 100 * limit
        far, same = (
            donor_distance(of, base, donor, site=site, places=["all"], runs=one)
            for one in (None, runs.towards(rows))
        )
        np.testing.assert_allclose(far, same, rtol=1e-5)
    anew, found = (
        swept(model, stack, x, "zero", site="mlp_out", engine=engine, runs=one).values
        for one in (None, runs.towards(None))
    )
    np.testing.assert_allclose(found, anew, rtol=0, atol=limit)
    with pytest.raises(InputError, match=r"runs that were made before.*Leave out donor_model"):
        swept(model, stack, x, y[[0]], precision="float32", runs=runs.towards(range(1)))
    for use in (partial(swept, model, stack), partial(donor_distance, of, places=["all"])):
        with pytest.raises(InputError, match=r"did not keep .*give run_pair its site"):
            use(x, y[[0]], site="z", runs=runs.towards(range(1)))


def test_half_of_zero_and_two_is_one() -> None:
    """By hand, of one strength and of one for each entry."""
    values, entries = torch.zeros(2, 1), np.arange(2)

    def mixed(c: Any) -> list[float]:
        write = DonorWrite("interpolate", c, lambda spots, units: torch.full((2, 1), 2.0), entries)
        return write(values, entries).flatten().tolist()

    assert mixed(0.5) == [1.0, 1.0]
    assert mixed(np.array([0.5, 0.25], np.float32)) == [1.0, 0.5]


def test_what_is_refused(model: HookedALM) -> None:
    x = model.encode(**INPUTS)
    for wrong in ((), (0.5, float("nan"))):
        with pytest.raises(InputError, match="expected some finite numbers"):
            patch(model, x, x, METRIC, places=["all"], coefficients=wrong)
    for given, site, match in (
        ("self", "z", "expected prompts, or 'zero'"), (x, "pattern", "at the pattern"),
        (x, "gate", "expected one of resid_pre"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=match):
            donor_distance(model, x, given, site=site, places=["all"])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="layer"):
        donor_distance(model, x, x, layers=[9], places=["all"])
