"""Batches of prompts of about one length, decided before anything runs."""

from hypothesis import given
from hypothesis import strategies as st

from hooked_alm.experiments.workbench.batches import bucketed


def test_batches_by_hand() -> None:
    lengths = [5, 9, 5, 4, 9, 30]
    assert bucketed(lengths, 2) == [[3, 0], [2, 1], [4, 5]]
    assert bucketed(lengths, 3, positions=18) == [[3, 0, 2], [1, 4], [5]]
    assert bucketed(lengths, 6, kinds="babbab") == [[3, 0, 2, 5], [1, 4]]
    assert bucketed(lengths, 1) == [[3], [0], [2], [1], [4], [5]]
    assert bucketed([], 3) == []


@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from("ab")), max_size=30),
    st.integers(1, 7),
    st.one_of(st.none(), st.integers(1, 90)),
)
def test_every_prompt_is_in_one_batch_that_fits(
    prompts: list[tuple[int, str]], size: int, positions: int | None
) -> None:
    lengths, kinds = [n for n, _ in prompts], [kind for _, kind in prompts]
    batches = bucketed(lengths, size, positions, kinds=kinds)
    assert sorted(i for batch in batches for i in batch) == list(range(len(prompts)))
    for batch in batches:
        assert 1 <= len(batch) <= size
        assert len({kinds[i] for i in batch}) == 1
        filled = len(batch) * max(lengths[i] for i in batch)
        assert positions is None or len(batch) == 1 or filled <= positions
    # The same input gives the same batches: they are part of what a run is.
    assert bucketed(lengths, size, positions, kinds=kinds) == batches
