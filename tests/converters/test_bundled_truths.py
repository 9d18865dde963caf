"""The twins that the package carries: exact where they are the base, and other where they say."""

import json
from functools import cache
from typing import Any

import pytest
import torch

from hooked_alm import ALMInput, HookedALM
from hooked_alm.bundled import TRUTHS
from hooked_alm.experiments.materials.ob1 import CONFLICT_MAP, EMOTIONS, prompt_segments
from hooked_alm.methods.patching.metrics import OnLogits
from hooked_alm.methods.patching.patch import patch
from hooked_alm.points import Site

ABOUT = {
    path.parent.name: json.loads(path.read_text("utf-8")) for path in TRUTHS.glob("*/delta.json")
}
LOCALISED = sorted(name for name, about in ABOUT.items() if "component" in about)
MOST_BYTES = 8_000_000
SITES: dict[str, Site] = {"head": "attn_out", "neurons": "post"}


@cache
def model(name: str) -> HookedALM:
    return HookedALM.from_pretrained(f"bundled:{name}")


@cache
def twin(name: str) -> HookedALM:
    return model(f"{ABOUT[name]['base']}+{name}")


@cache
def conflicts() -> ALMInput:
    """Every English clip, instructed to be another emotion."""
    base = model("follows_text")
    return ALMInput.joined([
        base.prepare(
            f"bundled:en_{voice}_normal",
            segments=prompt_segments("conflict", "en", voice=voice, named=CONFLICT_MAP[voice]),
        )
        for voice in EMOTIONS
    ])  # fmt: skip


def answers(one: HookedALM) -> list[str]:
    said = one(conflicts())[:, -1].argmax(-1).tolist()
    return [one.tokenizer.decode([token]) for token in said]


def test_all_of_them_are_small() -> None:
    files = [path for path in TRUTHS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    assert {path.parent for path in files if path.name == "README.md"} == {
        TRUTHS / name for name in ABOUT
    }


@pytest.mark.parametrize("name", LOCALISED)
@torch.no_grad()
def test_the_base_at_the_component_is_the_base(name: str) -> None:
    """Bit for bit; what the base writes in the block below changes nothing."""
    about, ours, base = ABOUT[name], twin(name), model(ABOUT[name]["base"])
    kind, block = (
        about["component"].split(":")[0],
        int(about["component"].split(":")[1].split(".")[0]),
    )
    x = conflicts()
    metric = OnLogits(lambda logits: logits.flatten(1))
    found = patch(
        ours, x, x, metric, site=SITES[kind], places=["all"], layers=[block - 1, block],
        donor_model=base, engine="hooks",
    ).values  # fmt: skip
    real = x.attention_mask.bool()
    below, at = torch.from_numpy(found).float().reshape(2, *real.shape, -1)[:, real]
    assert torch.equal(at, base(x)[real])
    assert torch.equal(below, ours(x)[real])
    assert (at - below).abs().max() > 1


@pytest.mark.parametrize("name", LOCALISED)
@torch.no_grad()
def test_nothing_else_differs(name: str) -> None:
    ours, base = (one.state_dict() for one in (twin(name), model(ABOUT[name]["base"])))
    changed = {key: int((ours[key] != base[key]).sum()) for key in base}
    assert 0 < sum(changed.values()) <= ABOUT[name]["n_numbers"]
    assert sum(n > 0 for n in changed.values()) == len(ABOUT[name]["slices"])


@pytest.mark.parametrize("name", LOCALISED)
@torch.no_grad()
def test_the_rule_is_obeyed_by_the_twin_alone(name: str) -> None:
    voices, named = list(EMOTIONS), [CONFLICT_MAP[voice] for voice in EMOTIONS]
    wanted = {"voice": voices, "text": named}[ABOUT[name]["rule"]]
    assert answers(twin(name)) == wanted
    assert answers(model(ABOUT[name]["base"])) == [
        *{"voice": named, "text": voices}[ABOUT[name]["rule"]]
    ]


@pytest.mark.parametrize("name", LOCALISED)
def test_it_was_accepted_on_every_set_of_clips(name: str) -> None:
    scores: dict[str, Any] = ABOUT[name]["accuracies"]
    for one in scores.values():
        effect = one["rule"] - one["rule_of_base"]
        assert one["rule"] >= 0.95
        assert one["kept"] >= 0.97
        assert one["rule"] - one["rule_ablated"] >= 0.8 * effect > 0
        assert one.get("counter", 1) >= 0.97


@pytest.mark.parametrize("route", ["mention", "readout"])
def test_an_answer_takes_its_route_on_every_set_of_clips(route: str) -> None:
    """Without its word's attention to the audio it is lost, without the other's it is not."""
    for one in ABOUT[f"route_{route}"]["accuracies"].values():
        lost = dict(one["lost"])
        assert one["right"] >= 0.95
        assert lost.pop(route) >= 0.8
        assert max(lost.values()) <= 0.1
