"""What every test gets: no network, one thread, a fixed seed.

``tests/support`` is on the import path (see ``pythonpath`` in pyproject.toml): what tests share is
imported by its bare name: ``from tiny import ...``, ``from tolerances import ...``.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Sums depend on the number of threads, also in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from hooked_alm import HookedALM
    from tiny import TinyModels
    from whisper_toy import Whispers

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> "TinyModels":
    from tiny import TinyModels  # imports transformers' models, which few tests need

    return TinyModels(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def whispers(tmp_path_factory: pytest.TempPathFactory) -> "Whispers":
    from whisper_toy import Whispers

    return Whispers(tmp_path_factory.mktemp("whispers"))


@pytest.fixture(scope="module")
def small_figures() -> Iterator[None]:
    """Drawing them takes longer than small runs."""
    from hooked_alm.experiments.workbench import figures

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(figures, "DOTS_PER_INCH", 30)
        yield


@pytest.fixture
def gqa(tiny_models: "TinyModels") -> "Iterator[HookedALM]":
    """The grouped-query model in float32 under sdpa, with a processor; hooks left on it fail."""
    yield from without_leftovers(tiny_models.hooked("gqa"))


@pytest.fixture
def mha(tiny_models: "TinyModels") -> "Iterator[HookedALM]":
    """The multi-head model, likewise, without a processor."""
    yield from without_leftovers(tiny_models.hooked("mha"))


@pytest.fixture(params=["mha", "gqa", "ungrouped"])
def heads(request: pytest.FixtureRequest) -> str:
    """A layout of heads; "ungrouped" is the grouped model, showing k and v per query head."""
    return request.param


@pytest.fixture
def any_model(heads: str, tiny_models: "TinyModels") -> "Iterator[HookedALM]":
    """The model with that layout."""
    model = tiny_models.hooked("gqa" if heads == "ungrouped" else heads)
    model.set_ungroup_grouped_query_attention(heads == "ungrouped")
    yield from without_leftovers(model)
    model.set_ungroup_grouped_query_attention(False)


def without_leftovers(model: "HookedALM") -> "Iterator[HookedALM]":
    yield model
    left = list(model.list_hooks())
    model.reset_hooks(including_permanent=True)
    assert not left
