"""ASR components on a tiny Whisper: heads left out against Hugging Face's, and as a whole."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from asr_components_verdicts import cases
from hooked_alm.errors import InputError
from hooked_alm.experiments.asr_components.experiment import AsrComponents
from hooked_alm.experiments.asr_components.pages import lead, method
from hooked_alm.experiments.asr_components.plan import ALL, HeadNode, chosen_nodes
from hooked_alm.experiments.asr_components.settings import AsrComponentsConfig
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.executors import Processes
from hooked_alm.experiments.workbench.results import having
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.methods.statistics.repetition import loops
from noise_clips import noise_table
from stopped_runs import interrupted
from tiny import TinyModels
from whisper_toy import END, Whispers

TEXTS = ("two cats", "", "a dog", "", "a cat", "the dog", "")
N_NEW = 20
SETTINGS: dict[str, Any] = {
    "n_resamples": 1000, "max_new_tokens": N_NEW, "language": "en", "batch_size": 3, "n_exact": 1,
    "n_random": 1, "normaliser": "none",
}  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven clips, in three of which nothing is said."""
    n = range(len(TEXTS))
    return noise_table(
        tmp_path_factory.mktemp("spoken"), [0.3 + 0.1 * i for i in n],
        sentence=TEXTS, speaker=[f"s{i % 2}" for i in n],
    )  # fmt: skip


def experiment(model: Path, table: Path, **changes: Any) -> AsrComponents:
    given = {**SETTINGS, **changes}
    return AsrComponents(AsrComponentsConfig(model=str(model), audio=str(table), **given))


@pytest.fixture(scope="module")
def run(
    small_figures: None, whispers: Whispers, table: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    out = tmp_path_factory.mktemp("run") / "run"
    return runner.run(experiment(whispers.folder(), table), out)


@pytest.fixture
def unpaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the rest."""
    monkeypatch.setattr(AsrComponents, "page", lambda self, page, run: None)


KINDS = {"self": "self_attn", "cross": "encoder_attn"}


def closed(
    hf: Any, node: HeadNode, means: Mapping[tuple[str, int], Tensor] | None = None
) -> Iterator[Any]:
    """Hooks on Hugging Face's output projections, whose input has a head's part at zero, or mean.

    Args:
        hf: the model.
        node: the head.
        means: (kind, block) -> what the whole input is instead.
    """
    name = KINDS[node.kind]
    for layer, block in enumerate(hf.model.decoder.layers):
        if node.layer not in (ALL, layer):
            continue
        size = getattr(block, name).head_dim

        own = slice(node.head * size, (node.head + 1) * size)

        def without(
            module: Any, args: tuple[Tensor], own: slice = own, layer: int = layer
        ) -> tuple[Tensor]:
            z = args[0].clone()
            z[..., own] = 0 if means is None else means[node.kind, layer][own]
            return (z,)

        yield getattr(block, name).out_proj.register_forward_pre_hook(without)


@torch.no_grad()
def greedy(hf: Any, x: Any) -> list[int]:
    """One whole pass for every token; nothing is suppressed."""
    memory = hf.model.encoder(x.clips[0].features).last_hidden_state
    ids = x.tokens
    for _ in range(N_NEW):
        logits = hf(decoder_input_ids=ids, encoder_outputs=(memory,)).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    said: list[int] = ids[0, x.shape[1] :].tolist()
    return said[: said.index(END)] if END in said else said


def test_heads_are_left_out_as_in_hugging_face(
    run: RunFolder, whispers: Whispers, table: Path
) -> None:
    """Every clip without every head that was chosen, token by token."""
    hf, model, found = whispers.hf(), whispers.hooked(), run.read_table("ablated")
    prompts = {
        f"c{n}": model.prepare(table.parent / f"c{n}.wav", language="en") for n in range(len(TEXTS))
    }
    as_is = run.read_table("transcripts").set_index("clip")
    n_changed = 0
    for _, some in found.groupby("node"):
        row = some.iloc[0]
        node = HeadNode(row.kind, int(row.layer), int(row["head"]))
        assert {*some["clip"]} == {*prompts}
        handles = [*closed(hf, node)]
        try:
            for one in some.head(2).to_dict("records"):
                said = greedy(hf, prompts[one["clip"]])
                assert one["text"] == model.tokenizer.decode(said).strip()
                assert one["loops"] == loops(said)
                n_changed += one["text"] != as_is.text[one["clip"]]
        finally:
            for handle in handles:
                handle.remove()
    assert n_changed
    assert set(run.read_table("controls").verdict) == {"pass"}


@pytest.mark.usefixtures("unpaged")
@torch.no_grad()
def test_means_take_the_place_of_heads_as_in_hugging_face(
    run: RunFolder, whispers: Whispers, table: Path, tmp_path: Path
) -> None:
    """Means over every clip's prompt and transcript, then over clips, by Hugging Face alone."""
    hf, model = whispers.hf(), whispers.hooked()
    prompts = {
        f"c{n}": model.prepare(table.parent / f"c{n}.wav", language="en") for n in range(len(TEXTS))
    }
    kept: dict[tuple[str, int], list[Tensor]] = {}

    def keep(module: Any, args: tuple[Tensor], key: tuple[str, int]) -> None:
        kept.setdefault(key, []).append(args[0][0].mean(0))

    for x in prompts.values():
        ids = torch.cat([x.tokens, torch.tensor([greedy(hf, x)])], dim=1)
        memory = hf.model.encoder(x.clips[0].features).last_hidden_state
        handles = [
            getattr(block, name).out_proj.register_forward_pre_hook(partial(keep, key=(kind, n)))
            for n, block in enumerate(hf.model.decoder.layers) for kind, name in KINDS.items()
        ]  # fmt: skip
        hf(decoder_input_ids=ids, encoder_outputs=(memory,))
        for handle in handles:
            handle.remove()
    means = {key: torch.stack(some).mean(0) for key, some in kept.items()}
    found = runner.run(experiment(whispers.folder(), table, ablation="mean"), tmp_path / "run")
    ablated, zeros = found.read_table("ablated"), run.read_table("ablated")
    pd.testing.assert_frame_equal(found.read_table("screen"), run.read_table("screen"))
    for _, some in ablated.groupby("node"):
        row = some.iloc[0]
        node = HeadNode(row.kind, int(row.layer), int(row["head"]))
        handles = [*closed(hf, node, means)]
        try:
            for one in some.head(2).to_dict("records"):
                said = greedy(hf, prompts[one["clip"]])
                assert one["text"] == model.tokenizer.decode(said).strip(), node.name
        finally:
            for handle in handles:
                handle.remove()
    assert (ablated.text != zeros.text).any()


def test_what_fails_is_screened_and_all_heads_are(run: RunFolder) -> None:
    screen, transcripts = run.read_table("screen"), run.read_table("transcripts")
    failing = transcripts[transcripts.loops == 1]
    assert len(failing)
    assert {*screen[screen.of == "loop"]["clip"]} == {*failing["clip"]}
    invented = transcripts[(transcripts.holds == "no_speech") & (transcripts.heard == 1)]
    assert {*screen[screen.of == "hallucination"]["clip"]} == {*invented["clip"]}
    cells = screen.drop_duplicates(["kind", "layer", "head"])
    assert cells.groupby("kind").size().to_dict() == {"cross": 4, "self": 4}
    nodes = run.read_table("heads")
    assert {*nodes.kind} == {"cross", "self"}
    assert {*nodes.layer} > {ALL}


def test_the_first_are_those_that_the_failure_rests_on_most() -> None:
    """And the random ones those of the others whose norms are nearest."""
    rows = [
        {"clip": "c", "of": "loop", "kind": kind, "layer": layer, "head": head,
         "effect": effect, "norm": norm}
        for kind, layer, head, effect, norm in (
            ("cross", 0, 0, 0.5, 9.0), ("cross", 0, 1, -0.1, 3.1), ("cross", 1, 0, -2.0, 3.0),
            ("cross", 1, 1, 0.0, 8.0), ("self", 0, 0, -1.0, 1.0), ("self", 0, 1, 0.0, 1.0),
        )
    ]  # fmt: skip
    config = AsrComponentsConfig(n_exact=1, n_random=1)
    found = chosen_nodes(pd.DataFrame(rows), config)
    assert {node.name: why for node, why in found.items()} == {
        "cross L1H0": ["loop"], "cross L0H1": ["random"],
        "cross head 0 in all blocks": ["loop"], "cross head 1 in all blocks": ["random"],
        "self L0H0": ["loop"], "self L0H1": ["random"],
        "self head 0 in all blocks": ["loop"], "self head 1 in all blocks": ["random"],
    }  # fmt: skip


@pytest.mark.usefixtures("unpaged")
def test_stopped_or_in_two_processes_it_leaves_the_same_bytes(
    run: RunFolder, whispers: Whispers, table: Path, tmp_path: Path
) -> None:
    def again() -> AsrComponents:
        return experiment(whispers.folder(), table)

    tables = {path.name: path.read_bytes() for path in run.path.glob("tables/*")}
    for stop in ({2}, {5}):  # among the clips as they are, and among the heads
        with pytest.raises(KeyboardInterrupt):
            runner.run(interrupted(again(), stop), tmp_path / "stopped")
    for name, executor in (("stopped", {}), ("two", {"executor": Processes(2)})):
        found = runner.run(again(), tmp_path / name, **executor)
        assert {p.name: p.read_bytes() for p in found.path.glob("tables/*")} == tables


@pytest.mark.usefixtures("unpaged")
def test_a_model_without_cross_attention(
    tiny_models: TinyModels, table: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(InputError, match="its decoder has no cross-attention. Set kinds"):
        runner.run(experiment(tiny_models.folder(), table, language=None), out)
    assert not out.exists()
    changes = {"kinds": ("self",), "language": None, "scopes": ("cell",)}
    found = runner.run(experiment(tiny_models.folder(), table, **changes), out)
    assert len(found.read_table("transcripts")) == len(TEXTS)
    assert set(found.read_table("controls").verdict) <= {"pass", "not applicable"}


def test_where_no_clip_fails_no_head_is_said_to_be_left_out() -> None:
    run = cases()
    assert "4 heads with some of about the same norm" in lead(run)
    sound = having(run["transcripts"], holds="speech", loops=0)
    tables = {**run.tables, "transcripts": sound, "heads": run["heads"].iloc[:0]}
    none = replace(run, tables=tables)
    assert lead(none).endswith("something is heard. As none fails, no head is left out.")
    assert "No head was left out." in method(none)
    assert "took their place" not in method(none)
