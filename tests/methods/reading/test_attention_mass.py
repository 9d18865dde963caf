"""Attention mass against sums of ``hook_pattern``, by numbers, and without its T x T scores."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hooked_alm import ALMInput, HookedALM, InputError
from hooked_alm.inputs import positions_from_mask
from hooked_alm.methods.reading.attention_mass import attention_density, attention_mass
from hooked_alm.spans import SpanMap
from tiny import VOCAB, TinyModels, hf_inputs
from tolerances import MASS_OF_PATTERN

PARTITION = ("audio", "audio_struct", "text", "struct", "sink", "readout")
CASES = {
    "one row": hf_inputs([[63]], [9]),
    "left-padded": hf_inputs([[63], [23]], [9, 14]),
    "two clips and none": hf_inputs([[30, 17], []], [8, 12]),
}


def from_pattern(
    model: HookedALM, x: ALMInput, spans: tuple[str, ...], queries: list[list[int]]
) -> Tensor:
    """The definition: sums of rows of the pattern ``[layer, batch, head, query, span]``."""
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    _, cache = model.run_with_cache(x, names_filter=names)
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack(
                        [
                            cache[name][row][:, queries[row]][..., x.spans.positions(span, row)]
                            .float()
                            .sum(-1)
                            for span in spans
                        ],
                        dim=-1,
                    )
                    for row in range(len(x))
                ]
            )
            for name in names
        ]
    )


@pytest.mark.parametrize("variant", ["gqa", "mha", "mqa, sliding"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_mass_is_the_sum_of_the_pattern(
    tiny_models: TinyModels, variant: str, attention: str, dtype: torch.dtype
) -> None:
    model = tiny_models.hooked(variant, dtype, attention)
    for case, inputs in CASES.items():
        x = model.encode(**inputs)
        last = x.shape[1] - 1
        # The readout by default; else out of order, one twice, beyond a window of 5, and the first.
        for queries in (None, [[last - 3, last, last - 3, first(x, row)] for row in range(len(x))]):
            got = attention_mass(
                model, x, PARTITION, queries=None if queries is None else torch.tensor(queries)
            )
            assert got.dtype == torch.float32
            expected = from_pattern(model, x, PARTITION, queries or [[last]] * len(x))
            assert got.shape == expected.shape
            tolerance = MASS_OF_PATTERN[dtype]
            torch.testing.assert_close(got, expected, atol=tolerance, rtol=0, msg=case_of(case))


def case_of(case: str) -> Any:
    return lambda message: f"{case}: {message}"


def first(x: ALMInput, row: int) -> int:
    return int(x.attention_mask[row].argmax())


@torch.no_grad()
def test_first_position_attends_to_itself(gqa: HookedALM) -> None:
    """Exactly: nothing else is visible, and pads are not."""
    x = gqa.encode(**CASES["left-padded"])
    queries = torch.tensor([[first(x, 0)], [first(x, 1)]])
    mass = attention_mass(gqa, x, ("sink", "audio", "text"), queries=queries)
    assert torch.equal(mass, torch.tensor([1.0, 0, 0]).expand_as(mass))


@torch.no_grad()
def test_negative_queries_count_from_the_end_and_pads_see_nothing(gqa: HookedALM) -> None:
    x = gqa.encode(**CASES["left-padded"])
    last = x.shape[1] - 1
    mass = attention_mass(gqa, x, PARTITION, queries=torch.tensor([[-1, -4], [-1, 2]]))
    same = attention_mass(gqa, x, PARTITION, queries=torch.tensor([[last, last - 3], [last, 2]]))
    assert torch.equal(mass[:, 0], same[:, 0])
    assert torch.equal(mass[:, 1, :, 0], same[:, 1, :, 0])
    assert mass[:, 1, :, 1].isnan().all()
    assert not mass[:, 0].isnan().any()


@torch.no_grad()
def test_window_hides_what_lies_before_it(tiny_models: TinyModels) -> None:
    """The last two blocks see five positions; the readout's hold no audio."""
    model = tiny_models.hooked("mqa, sliding")
    mass = attention_mass(model, model.encode(**CASES["one row"]), ("audio", "sink"))
    assert (mass[:2] > 0).all()
    assert (mass[2:] == 0).all()


@torch.no_grad()
def test_layers_spans_and_overlaps(gqa: HookedALM) -> None:
    x = gqa.encode(**CASES["left-padded"])
    every = attention_mass(gqa, x, PARTITION)
    assert every.shape == (4, 2, 6, 1, 6)
    assert torch.equal(attention_mass(gqa, x, PARTITION, layers=[2, 0]), every[[2, 0]])
    overlapping = attention_mass(gqa, x, ("text", "audio", "text"))
    # Not exact: a product with another number of columns.
    tolerance = MASS_OF_PATTERN[torch.float32]
    torch.testing.assert_close(overlapping, every[..., [2, 0, 2]], atol=tolerance, rtol=0)
    # A span that no row has weighs nothing.
    text_only = gqa.encode(**hf_inputs([[]], [12]))
    assert torch.equal(attention_mass(gqa, text_only, ["audio"]), torch.zeros(4, 1, 6, 1, 1))


@torch.no_grad()
def test_stops_after_the_last_layer_asked_for(gqa: HookedALM) -> None:
    x = gqa.encode(**CASES["one row"])
    with gqa.hooks(fwd_hooks=[("blocks.2.hook_resid_pre", lambda value, hook: 1 / 0)]):
        attention_mass(gqa, x, ["audio"], layers=[1, 0])
        with pytest.raises(ZeroDivisionError):
            attention_mass(gqa, x, ["audio"], layers=[2])


@torch.no_grad()
def test_observing_leaves_the_run_alone_and_sees_edits(gqa: HookedALM) -> None:
    """Runs inside other hooks: a model whose queries are zero attends evenly."""
    x = gqa.encode(**CASES["left-padded"])
    before = gqa(x)
    evenly = [("blocks.1.attn.hook_rot_q", lambda value, hook: torch.zeros_like(value))]
    with gqa.hooks(fwd_hooks=evenly):
        mass = attention_mass(gqa, x, PARTITION, layers=[1])
    sizes = torch.stack([x.spans.mask(name).sum(1) for name in PARTITION], dim=-1).float()
    even = (sizes / sizes.sum(-1, keepdim=True))[None, :, None, None].expand_as(mass)
    tolerance = MASS_OF_PATTERN[torch.float32]
    torch.testing.assert_close(mass, even, atol=tolerance, rtol=0)
    density = attention_density(mass, x, PARTITION)
    present = (sizes > 0)[None, :, None, None].expand_as(density)
    torch.testing.assert_close(
        density[present],
        torch.ones_like(density[present]),
        atol=MASS_OF_PATTERN[torch.float32],
        rtol=0,
    )
    assert density[~present].isnan().all()
    assert torch.equal(gqa(x), before)


def four_positions(n_pads: int = 0) -> ALMInput:
    """The prompt of card S-6: sink, two audio positions, one of text."""
    mask = torch.tensor([[0] * n_pads + [1] * 4])
    spans = {"sink": (0, 1), "audio": (1, 3), "text": (3, 4), "none": (0, 0)}
    ranges = {
        name: [[(n_pads + start, n_pads + stop)] if start < stop else []]
        for name, (start, stop) in spans.items()
    }
    return ALMInput(
        tokens=torch.full_like(mask, 5),
        attention_mask=mask,
        position_ids=positions_from_mask(mask),
        spans=SpanMap({**ranges, "readout": ranges["text"]}, mask.shape[1]),
    )


@pytest.mark.parametrize("n_pads", [0, 3])
@torch.no_grad()
def test_card_s6(gqa: HookedALM, n_pads: int) -> None:
    """Row (0.5, 0.2, 0.2, 0.1), made by writing it into queries and keys."""
    x = four_positions(n_pads)
    row = torch.tensor([0.9] * n_pads + [0.5, 0.2, 0.2, 0.1])

    def write_q(value: Tensor, hook: Any) -> Tensor:
        out = torch.zeros_like(value)
        out[..., 0] = 1 / gqa.blocks[0].attn.scaling
        return out

    def write_k(value: Tensor, hook: Any) -> Tensor:
        out = torch.zeros_like(value)
        out[..., 0] = row.log()[None, :, None]
        return out

    hooks = [("blocks.0.attn.hook_rot_q", write_q), ("blocks.0.attn.hook_rot_k", write_k)]
    with gqa.hooks(fwd_hooks=hooks):
        mass = attention_mass(gqa, x, ("sink", "audio", "text", "none"), layers=[0])
    assert mass.shape == (1, 1, 6, 1, 4)
    expected = torch.tensor([0.5, 0.4, 0.1, 0.0]).expand_as(mass)
    torch.testing.assert_close(mass, expected, atol=MASS_OF_PATTERN[torch.float32], rtol=0)
    # 4 visible positions; the pads count for nothing.
    density = attention_density(mass, x, ("sink", "audio", "text", "none"))
    torch.testing.assert_close(
        density, torch.tensor([2.0, 0.8, 0.4, torch.nan]).expand_as(mass),
        atol=MASS_OF_PATTERN[torch.float32], rtol=0, equal_nan=True,
    )  # fmt: skip


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@torch.no_grad()
def test_no_scores_are_made(gqa: HookedALM) -> None:
    """At T = 700, T² is larger than any other tensor of a tiny model."""
    n_pos = 700
    x = gqa.encode(input_ids=torch.randint(3, 300, (1, n_pos)))
    assert n_pos * max(gqa.cfg.n_heads * gqa.cfg.d_head, VOCAB) < n_pos**2
    with Largest() as largest:
        attention_mass(gqa, x, ("text", "sink"))
    assert largest.numel < n_pos**2
    with Largest() as largest:
        gqa.run_with_cache(x, names_filter="blocks.0.attn.hook_pattern")
    assert largest.numel >= 6 * n_pos**2, "the recorder sees scores where there are some"


def test_bad_choices(gqa: HookedALM) -> None:
    x = gqa.encode(**CASES["one row"])
    with pytest.raises(InputError, match=r"blocks \[4\]: the model has blocks 0 to 3"):
        attention_mass(gqa, x, ["audio"], layers=[4])
    with pytest.raises(InputError, match=r"blocks \[\]: .* Name at least one"):
        attention_mass(gqa, x, ["audio"], layers=[])
    n = x.shape[1]
    for position in (n, -n - 1):
        with pytest.raises(InputError, match=rf"positions \[\[{position}\]\]: .* 0 to {n - 1}"):
            attention_mass(gqa, x, ["audio"], queries=torch.tensor([[position]]))
    with pytest.raises(InputError, match="looking up span 'speech': this input has audio"):
        attention_mass(gqa, x, ["audio", "speech"])
