"""Which neurons are held: the most sensitive, others drawn beside them; logs kept and merged."""

import torch

from hooked_alm.methods.robustness.choices import NeuronChoices, packed, unpacked
from hooked_alm.methods.robustness.sensitivity import SensitivityLog


def log(scale: float = 1.0) -> SensitivityLog:
    """Of two blocks of six neurons, the later the more sensitive."""
    found = SensitivityLog.empty(2, 6)
    found.add(0, torch.zeros(3, 6), scale * torch.arange(6.0).expand(3, 6))
    found.add(1, torch.ones(3, 6), 1 + scale * torch.arange(6.0, 12.0).expand(3, 6))
    found.items += 1
    found.rows += 3
    return found


def test_drawn_neurons_are_as_many_and_others() -> None:
    choices = NeuronChoices({"lm": log(), "audio": log()}, "abs_sum", False, seed=3)
    chosen = choices.neurons("lm", 25)
    assert chosen == [(1, 5), (1, 4), (1, 3)]
    assert choices.scores("lm")[1, 5] == 33
    drawn = {
        (place, chosen_by, draw): choices.neurons(place, 25, chosen_by, draw)
        for place in ("lm", "audio") for chosen_by in ("random", "layer") for draw in range(3)
    }  # fmt: skip
    for (_, chosen_by, _), some in drawn.items():
        assert len({*some}) == 3
        assert not {*some} & {*chosen}
        assert chosen_by == "random" or {block for block, _ in some} == {1}
    assert drawn["lm", "random", 0] != drawn["lm", "random", 1]
    again = NeuronChoices(choices.logs, "abs_sum", False, seed=3)
    assert again.neurons("lm", 25, "random", 1) == drawn["lm", "random", 1]
    assert choices.neurons("lm", 5, "random") == []


def test_logs_come_back_together() -> None:
    parts = [packed({"lm": log(), "audio": log(2.0)}), packed({"lm": log(3.0)})]
    found = unpacked(parts)
    assert {*found} == {"lm", "audio"}
    assert int(found["lm"].items) == 2
    assert torch.equal(found["lm"].abs_sum, 4 * log().abs_sum)
    assert torch.equal(found["audio"].abs_sum, 2 * log().abs_sum)
    assert unpacked([{}]) == {}
