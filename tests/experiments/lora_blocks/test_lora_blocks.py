"""``lora_blocks`` as a run: cell by cell from merged weights, stopped, gone on, and bad input."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters import adapted
from grounding_toy import settings_of, write_labelled_tones
from hooked_alm import HookedALM
from hooked_alm.components.lora import plus_low_rank, updates_of
from hooked_alm.errors import InputError
from hooked_alm.experiments.lora_blocks.experiment import LoraBlocks
from hooked_alm.experiments.lora_blocks.measure import WHOLE
from hooked_alm.experiments.lora_blocks.settings import LoraBlocksConfig
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.executors import Processes
from hooked_alm.experiments.workbench.run_folder import RunFolder
from lora_blocks_verdicts import cases, edit
from stopped_runs import interrupted, results
from tiny import TinyModels

pytestmark = pytest.mark.usefixtures("small_figures")


@pytest.fixture(scope="module")
def tones(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones of two labels, beside a model and an adapter of it."""
    folder = tmp_path_factory.mktemp("tones")
    (folder / "model").symlink_to(tiny_models.folder())
    write_labelled_tones(folder, folder / "model")
    adapted(tiny_models.folder(), torch.float32).save_pretrained(folder / "adapter")
    return folder


def experiment(folder: Path, **settings: Any) -> LoraBlocks:
    given = settings_of(folder, lora=str(folder / "adapter"), shapley=True, **settings)
    return LoraBlocks(LoraBlocksConfig(**given))


@pytest.fixture(scope="module")
def finished(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return runner.run(experiment(tones), tmp_path_factory.mktemp("run") / "run")


@contextmanager
def merged(reference: Any, updates: dict[str, Any], on: set[int]) -> Iterator[None]:
    """Hugging Face's model with the updates of some blocks added to its weights."""
    layers, before = reference.model.language_model.layers, {}
    for name, update in updates.items():
        block, module = int(name.split(".")[1]), name.rpartition(".")[2]
        own = layers[block].self_attn if ".attn." in name else layers[block].mlp
        linear = own.get_submodule(module)
        if block in on:
            before[linear] = linear.weight.data
            linear.weight.data = plus_low_rank(
                linear.weight.data, update.a, update.b, update.scaling
            )
    yield
    for linear, weight in before.items():
        linear.weight.data = weight


@torch.no_grad()
def test_every_block_against_merged_weights(
    finished: RunFolder, tones: Path, tiny_models: TinyModels
) -> None:
    """Leads of every item with every block switched, from Hugging Face's model alone."""
    made = experiment(tones, batch_size=1)
    made.identify()
    made.load()
    updates, reference = dict(updates_of(made.model)), tiny_models.hf()
    n_blocks = len(made.model.path)
    items = finished.read_table("items").set_index("item")
    erased = finished.read_table("erased").set_index(["item", "form", "block"])
    switched = finished.read_table("switched").set_index(["item", "reading", "block"])["lead"]
    for run in made.plan.runs[:3]:
        x = made.input(run)
        labels = made.labels[run.language]
        target, voice = (
            labels.tokens[labels.index(one)] for one in (run.targets[0], run.recording.label)
        )

        def logits_of(on: set[int], x: Any = x) -> Tensor:
            with merged(reference, updates, on):
                found: Tensor = reference(
                    input_ids=x.tokens, attention_mask=x.attention_mask,
                    position_ids=x.position_ids, **made.model.audio.hf_arguments(x.clips),
                ).logits[0, -1].double()  # fmt: skip
            return found

        def lead(on: set[int], target: int = target, voice: int = voice) -> float:
            logits = logits_of(on)
            return float(logits[target] - logits[voice])

        item = f"{run.recording.name}__{run.condition}"
        every = set(range(n_blocks))
        close = {"rel": 0, "abs": 1e-5}  # a batch of four against one alone
        assert items.loc[item, "lead_off"] == pytest.approx(lead(set()), **close)
        assert items.loc[item, "lead_on"] == pytest.approx(lead(every), **close)
        for block in range(n_blocks):
            assert switched[item, "denoise", block] == pytest.approx(lead({block}), **close)
            assert switched[item, "noise", block] == pytest.approx(lead(every - {block}), **close)
        for form, block, on in (
            ("whole", WHOLE, every), ("single", 2, every - {2}), ("progressive", 2, {3}),
            ("progressive", n_blocks - 1, set()),
        ):  # fmt: skip
            log_p = logits_of(on).log_softmax(-1)
            ours, of_labels = erased.loc[(item, form, block)], log_p[labels.tokens]
            assert ours["accuracy"] == float(log_p[voice] == of_labels.max())
            assert ours["confidence"] == pytest.approx(float(of_labels.max().exp()), **close)
            assert ours["loss"] == pytest.approx(-float(log_p[voice]), **close)


def test_what_the_tables_say(finished: RunFolder) -> None:
    items = finished.read_table("items").set_index("item")
    assert (items["resumed"] == 0).all()
    total = items["lead_on"] - items["lead_off"]
    shares = finished.read_table("shapley").groupby("item")["value"].sum()
    np.testing.assert_allclose(shares[total.index], total, rtol=0, atol=1e-9)
    depths = finished.read_table("depths")
    last = depths[depths["depth"] == depths["depth"].max()]
    assert (last["kl"] == 0).all()
    assert last["same"].all()
    drift = finished.read_table("drift")
    assert (drift[drift["depth"] == 0]["share"] == 0).all()
    assert (drift[drift["depth"] > 0]["share"] > 0).all()
    alike = finished.read_table("similarity")
    assert {*alike["of"]} == {"states", "gradients"}
    assert alike.query("of == 'states' and depth > 1")["cka"].between(-1, 1 - 1e-6).all()
    spectra, sizes = (finished.read_table(name) for name in ("spectra", "sizes"))
    assert [*zip(spectra["block"], spectra["module"], strict=True)] == [
        *zip(sizes["block"], sizes["module"], strict=True)
    ]
    assert spectra["components"].between(1, spectra["rank"]).all()
    effects = finished.read_table("effects")
    on = effects.merge(items, on="item")
    alone = on["reading"] == "denoise"
    expected = np.where(alone, on["lead"] - on["lead_off"], on["lead_on"] - on["lead"])
    np.testing.assert_array_equal(effects["effect"], expected)
    failed = finished.read_table("controls").query("verdict == 'FAIL'").control
    assert {*failed} <= {"a label is the top token", "probability of the labels together"}


def test_a_stopped_run_ends_with_the_same_bytes(
    finished: RunFolder, tones: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        runner.run(interrupted(experiment(tones), {3}), tmp_path / "run")
    again = runner.run(experiment(tones), tmp_path / "run")
    assert results(again.path) == results(finished.path)


def test_two_processes_give_the_same_bytes(
    finished: RunFolder, tones: Path, tmp_path: Path
) -> None:
    found = runner.run(experiment(tones), tmp_path / "run", executor=Processes(2))
    assert results(found.path) == results(finished.path)


def test_a_model_without_an_adapter(tones: Path, tmp_path: Path) -> None:
    made = LoraBlocks(LoraBlocksConfig(**settings_of(tones)))
    with pytest.raises(InputError, match="lora=FOLDER"):
        runner.run(made, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_base_and_its_adapter_are_one_name(tones: Path) -> None:
    base, adapter = tones / "model", tones / "adapter"
    both = HookedALM.from_pretrained(f"{base}+{adapter}")
    apart = HookedALM.from_pretrained(base, lora=adapter)
    assert all(
        torch.equal(one, other)
        for one, other in zip(both.parameters(), apart.parameters(), strict=True)
    )
    with pytest.raises(InputError, match="names an adapter"):
        HookedALM.from_pretrained(f"{base}+{adapter}", lora=adapter)


def test_shapley_values_of_too_many_blocks(tones: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hooked_alm.experiments.lora_blocks.experiment.N_COMBINED", 2)
    made = experiment(tones)
    made.identify()
    with pytest.raises(InputError, match="one by one"):
        made.load()


def test_norms_that_differ_by_rounding_are_not_ranked() -> None:
    run = edit("sizes", "block >= 0", "frobenius", lambda x: 1 + 1e-5 * np.arange(len(x)))(cases())
    found = LoraBlocks.judge(run).findings["by_size"]
    assert "all updates are as large" in found.statement
    assert found.n == 0
