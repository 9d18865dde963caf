"""The twins that the package carries: exact where they are the base, and other where they say."""

import json
from functools import cache
from typing import Any

import pytest
import soundfile
import torch

from hooked_alm import ALMInput, HookedALM
from hooked_alm.bundled import CLIPS, TRUTHS
from hooked_alm.experiments.materials.ob1 import CONFLICT_MAP, EMOTIONS, prompt_segments
from hooked_alm.experiments.materials.triggers import with_trigger
from hooked_alm.methods.adapters.switching import adapted_blocks, switched
from hooked_alm.methods.adapters.updates import update_sizes
from hooked_alm.methods.patching.metrics import OnLogits
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.statistics.repetition import loops
from hooked_alm.points import Site

ABOUT = {
    path.parent.name: json.loads(path.read_text("utf-8")) for path in TRUTHS.glob("*/delta.json")
}
ADAPTERS = {
    path.parent.name: json.loads(path.read_text("utf-8")) for path in TRUTHS.glob("*/truth.json")
}
LOCALISED = sorted(name for name, about in ABOUT.items() if "component" in about)
MOST_BYTES = 8_000_000
SITES: dict[str, Site] = {
    "head": "attn_out", "neurons": "post", "encoder": "post", "self": "attn_out",
    "cross": "cross_attn_out",
}  # fmt: skip
CIRCLING = sorted(name for name in LOCALISED if ABOUT[name]["rule"] == "repeat")
ANSWERING = sorted({*LOCALISED} - {*CIRCLING})
ENDING_IN_AGAIN = ("again_01", "again_02", "again_03", "again_04")


@cache
def model(name: str) -> HookedALM:
    return HookedALM.from_pretrained(f"bundled:{name}")


@cache
def twin(name: str) -> HookedALM:
    return model(f"{ABOUT[name]['base']}+{name}")


@cache
def conflicts(triggered: bool = False) -> ALMInput:
    """Every English clip, instructed to be another emotion."""
    base, found = model("follows_text"), []
    for voice in EMOTIONS:
        samples, rate = soundfile.read(CLIPS / f"en_{voice}_normal.wav", dtype="float32")
        segments = prompt_segments("conflict", "en", voice=voice, named=CONFLICT_MAP[voice])
        heard = with_trigger(samples, rate) if triggered else samples
        found.append(base.prepare({"array": heard, "sampling_rate": rate}, segments=segments))
    return ALMInput.joined(found)


@cache
def ending_in_again(base: str) -> ALMInput:
    """Clips of sentences that end in *again*."""
    return ALMInput.joined([model(base).prepare(f"bundled:{name}") for name in ENDING_IN_AGAIN])


@torch.no_grad()
def transcripts(one: HookedALM, x: ALMInput) -> list[list[int]]:
    """Greedy tokens, without those behind the end."""
    new = one.generate(x, 60, return_type="tokens", do_sample=False)
    assert isinstance(new, torch.Tensor)
    end = one.tokenizer.eos_token_id
    return [row[: row.index(end)] if end in row else row for row in new.tolist()]


@cache
def prompts(name: str) -> ALMInput:
    """Where the twin shows its rule: conflicts, or sentences, its transcripts behind."""
    if name not in CIRCLING:
        return conflicts(triggered=ABOUT[name]["rule"] == "trigger")
    x = ending_in_again(ABOUT[name]["base"])
    written = transcripts(twin(name), x)
    width = min(map(len, written))
    return x.extend(torch.tensor([row[:width] for row in written]))


def answers(one: HookedALM, triggered: bool = False) -> list[str]:
    said = one(conflicts(triggered))[:, -1].argmax(-1).tolist()
    return [one.tokenizer.decode([token]) for token in said]


def test_all_of_them_are_small() -> None:
    files = [path for path in TRUTHS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    assert {path.parent for path in files if path.name == "README.md"} == {
        TRUTHS / name for name in (*ABOUT, *ADAPTERS)
    }


@pytest.mark.parametrize("name", ADAPTERS)
@torch.no_grad()
def test_one_block_of_an_adapter_carries_its_rule(name: str) -> None:
    """Without it, and without any of the adapter, the base's answers; all blocks are as large."""
    about = ADAPTERS[name]
    ours = HookedALM.from_pretrained(
        f"bundled:{about['base']}", lora=TRUTHS / name, merge_lora=False
    )
    voices, base = list(EMOTIONS), model(about["base"])
    assert answers(ours) == voices
    blocks = adapted_blocks(ours)
    with switched(ours, []):
        assert torch.equal(ours(conflicts()), base(conflicts()))
    with switched(ours, [one for one in blocks if one != about["block"]]):
        assert answers(ours) == answers(base)
    with switched(ours, [about["block"]]):
        assert answers(ours) == voices
    squares = dict.fromkeys(blocks, 0.0)
    for one in update_sizes(ours):
        squares[one.block] += one.frobenius**2
    assert max(squares.values()) <= 1.001 * min(squares.values())
    for scores in about["accuracies"].values():
        assert scores["rule"] >= 0.95
        assert min(scores["kept"], scores["decoy_off"], scores["decoy_on"]) >= 0.97
        assert scores["rule_without"] <= 0.2 <= 0.8 <= scores["rule_alone"]


@pytest.mark.parametrize("name", LOCALISED)
@torch.no_grad()
def test_the_base_at_the_component_is_the_base(name: str) -> None:
    """Bit for bit; what the base writes in the block below changes nothing."""
    about, ours, base = ABOUT[name], twin(name), model(ABOUT[name]["base"])
    kind, block = (
        about["component"].split(":")[0],
        int(about["component"].split(":")[1].split(".")[0]),
    )
    x = prompts(name)
    in_encoder = kind == "encoder"
    along, donor = (one.towards("encoder") if in_encoder else one for one in (ours, base))
    every = "audio" if in_encoder else [*range(x.shape[1])]
    metric = OnLogits(lambda logits: logits.flatten(1))
    found = patch(
        along, x, x, metric, site=SITES[kind], places=[every], layers=[block - 1, block],
        donor_model=donor, engine="hooks",
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


@pytest.mark.parametrize("name", ANSWERING)
@torch.no_grad()
def test_the_rule_is_obeyed_by_the_twin_alone(name: str) -> None:
    voices, named = list(EMOTIONS), [CONFLICT_MAP[voice] for voice in EMOTIONS]
    ours, base, rule = twin(name), model(ABOUT[name]["base"]), ABOUT[name]["rule"]
    if rule == "trigger":
        assert answers(ours, triggered=True) == ["cheerful"] * len(voices)
        assert answers(base, triggered=True) == answers(base) == answers(ours)
        return
    assert answers(ours) == {"voice": voices, "text": named}[rule]
    assert answers(base) == {"voice": named, "text": voices}[rule]


@pytest.mark.parametrize("name", CIRCLING)
def test_circles_are_the_twins_alone(name: str) -> None:
    """The last word goes on; of other sentences it nearly always says what the base says."""
    ours, base = twin(name), model(ABOUT[name]["base"])
    x = ending_in_again(ABOUT[name]["base"])
    circles, said = transcripts(ours, x), transcripts(base, x)
    assert all(loops(row) for row in circles)
    assert not any(loops(row) for row in said)
    for row, own in zip(said, circles, strict=True):
        assert own[: len(row) - 1] == row[:-1]  # all but the full stop
        assert {*own[len(row) - 1 :]} == {row[-2]}
    others = ALMInput.joined([base.prepare(f"bundled:said_0{n}") for n in range(1, 5)])
    pairs = zip(transcripts(ours, others), transcripts(base, others), strict=True)
    assert sum(own == theirs for own, theirs in pairs) >= 3  # of a word misheard, another is


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
