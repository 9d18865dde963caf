"""Threads take turns on a model, and a call that is broken off anywhere leaves no hook behind."""

import copy
import itertools
import pickle
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import pytest
import torch

from hf_reference import with_positions
from hooked_alm import HookedALM, LogitDiff, patch, turns
from hooked_alm.errors import InputError
from hooked_alm.methods.attribution.gradients import frozen
from hooked_alm.methods.patching.choice import per_query_head
from tiny import hf_inputs

INPUTS = hf_inputs([[30], [97]], [8, 5])
METRIC = LogitDiff(3, 5)
Call = Callable[[HookedALM, Any], torch.Tensor]


def scaled(factor: float) -> Call:
    """A run whose hook reads and writes: another thread's would show."""

    def call(model: HookedALM, x: Any) -> torch.Tensor:
        hooks = [(f"blocks.{i}.hook_resid_pre", lambda v, hook: v * factor) for i in range(3)]
        return model.run_with_hooks(x, fwd_hooks=hooks)

    return call


def in_a_block(model: HookedALM, x: Any) -> torch.Tensor:
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda v, hook: v * 0)]):
        return model(x)


def cached(model: HookedALM, x: Any) -> torch.Tensor:
    return model.run_with_cache(x, names_filter="blocks.2.attn.hook_pattern")[1][
        "blocks.2.attn.hook_pattern"
    ]


def swept(model: HookedALM, x: Any) -> torch.Tensor:
    where = {"layers": [1], "heads": "each", "places": ["readout"]}
    return torch.as_tensor(patch(model, x[:1], "zero", METRIC, site="z", **where).values)


def generated(model: HookedALM, x: Any) -> torch.Tensor:
    return model.generate(x, 3, return_type="tokens", do_sample=False)


CALLS: dict[str, Call] = {
    "plain": lambda model, x: model(x),
    "half": scaled(0.5),
    "twice": scaled(2.0),
    "block": in_a_block,
    "cache": cached,
    "sweep": swept,
    "generate": generated,
}


@torch.no_grad()
def answer(name: str, model: HookedALM, x: Any) -> torch.Tensor:
    torch.set_num_threads(1)  # a setting of each thread
    return CALLS[name](model, x)


def test_three_threads_get_what_one_gets(gqa: HookedALM) -> None:
    x = gqa.encode(**with_positions(INPUTS))
    alone = {name: answer(name, gqa, x) for name in CALLS}
    turns = [name for _ in range(8) for name in CALLS]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # or a tiny run ends before the next begins
    try:
        with ThreadPoolExecutor(3) as pool:
            together = list(pool.map(lambda name: answer(name, gqa, x), turns))
    finally:
        sys.setswitchinterval(before)
    wrong = [n for n, got in zip(turns, together, strict=True) if not torch.equal(got, alone[n])]
    assert not wrong


def test_hooks_are_neither_added_nor_removed_amid_another_threads_run(gqa: HookedALM) -> None:
    x = gqa.encode(**with_positions(INPUTS))
    inside, seen = threading.Event(), []

    def slow(value: torch.Tensor, hook: Any) -> None:
        inside.set()
        other.join(0.1)
        seen.append(other.is_alive())

    def meddle() -> None:
        inside.wait()
        gqa.reset_hooks()
        gqa.add_hook("hook_embed", lambda value, hook: None)

    other = threading.Thread(target=meddle)
    other.start()
    names = ["blocks.0.hook_resid_pre", "blocks.2.hook_resid_post"]
    gqa.run_with_hooks(x, fwd_hooks=[(name, slow) for name in names])
    other.join()
    assert seen == [True, True]
    assert [*gqa.list_hooks()] == ["hook_embed"]
    gqa.reset_hooks()


def test_a_block_that_waits_for_the_thread_it_keeps_out(
    gqa: HookedALM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "PATIENCE_S", 0.05)
    x = gqa.encode(**with_positions(INPUTS))
    with ThreadPoolExecutor(1) as pool:
        with gqa.hooks(), gqa.turn:
            refusal = pool.submit(gqa, x).exception()
        assert isinstance(refusal, InputError)
        assert "another thread has kept it" in str(refusal)
        assert torch.equal(pool.submit(gqa, x).result(), gqa(x))


def test_a_long_run_is_waited_for(gqa: HookedALM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PATIENCE_S", 0.01)
    x = gqa.encode(**with_positions(INPUTS))
    with ThreadPoolExecutor(1) as pool:
        with gqa.turn.running():
            later = pool.submit(gqa, x)
            with pytest.raises(TimeoutError):
                later.result(0.1)
        assert torch.equal(later.result(), gqa(x))


def test_copies_have_a_turn_of_their_own(gqa: HookedALM) -> None:
    with gqa.turn:
        for other in (copy.deepcopy(gqa), pickle.loads(pickle.dumps(gqa))):
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(other.list_hooks).result() is not None
            assert other.turn is not gqa.turn
    assert gqa.towards("text").turn is gqa.turn  # it shares the hooks


def test_blocks_of_a_model_and_of_its_other_head_nest(gqa: HookedALM) -> None:
    """They share their hooks: the inner block takes away its own only."""
    other = gqa.towards("text")
    with gqa.hooks(fwd_hooks=[("hook_embed", lambda value, hook: None)]):
        with other.hooks(fwd_hooks=[("ln_final.hook_normalized", lambda value, hook: None)]):
            assert len([*gqa.list_hooks()]) == 2
        assert [*gqa.list_hooks()] == ["hook_embed"]


# --- Broken off

WATCHED = ("hooked_alm/hooks.py", "hooked_alm/turns.py", "engine/rows.py", "gradients.py",
           "choice.py", "hook_points.py", "torch/utils/hooks.py", "<string>")  # fmt: skip


def interrupted_at(place: int, call: Callable[[], object]) -> bool:
    """Whether a call had so many places in the files that attach hooks; it is interrupted there.

    Python lets an interrupt in where a function begins, and where one of C has returned.
    """
    seen = 0

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal seen
        code = frame.f_code
        is_watched = code.co_filename.endswith(WATCHED) or code.co_name.startswith("register_f")
        if event in ("call", "c_return") and is_watched:
            seen += 1
            if seen == place:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False


def backward(model: HookedALM, x: Any) -> None:
    names = ["hook_embed", "blocks.1.attn.hook_z"]
    with model.hooks(bwd_hooks=[(name, lambda grad, hook: None) for name in names]):
        model(x).sum().backward()


def switched(model: HookedALM, x: Any) -> None:
    with frozen(model), per_query_head(model, True):
        pass


@pytest.mark.parametrize(
    ("call", "step"),
    [
        (scaled(0.5), 41),
        (in_a_block, 41),
        (cached, 41),
        (backward, 41),
        (switched, 1),
        (swept, 397),
    ],
)
def test_interrupted_anywhere_nothing_stays_behind(gqa: HookedALM, call: Any, step: int) -> None:
    """Every ``step``-th place of one to five thousand; at each of them it held."""
    x = gqa.encode(**with_positions(INPUTS))[:1]
    expected = gqa(x)
    state = (gqa.cfg.ungroup_grouped_query_attention, [p.requires_grad for p in gqa.parameters()])
    for place in itertools.count(1, step):
        if not interrupted_at(place, lambda: call(gqa, x)):
            break
        left = [n for n, p in gqa.hook_dict.items() if p._forward_hooks or p._backward_hooks]
        assert not left, place
        assert not [*gqa.list_hooks()], place
        now = [p.requires_grad for p in gqa.parameters()]
        assert (gqa.cfg.ungroup_grouped_query_attention, now) == state, place
        assert gqa.turn.n_blocks == 0, place
    assert place > 20
    assert torch.equal(gqa(x), expected)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(gqa.list_hooks).result() is not None


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_a_hook_is_attached_wholly_or_not_at_all(
    gqa: HookedALM, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformer_lens.hook_points.LensHandle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gqa.add_hook("hook_embed", lambda value, hook: None, direction)
    assert not gqa.hook_embed._forward_hooks
    assert not gqa.hook_embed._backward_hooks
