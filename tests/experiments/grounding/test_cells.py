"""Every cell of ``grounding`` against plain transformers under PyTorch hooks, family by family.

A row of the reference's batch is a cell's whole prompt; the fast engine, and the batch, round it
elsewhere (``tolerances.py``). Exchanged whole under ``engine="hooks"``, shares are *equal*.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from cases import kimi_audio, ultravox
from family_case import Case, Inputs
from grounding_reference import PlainPatching, Site
from hf_reference import with_positions
from hooked_alm import HookedALM
from hooked_alm.experiments.grounding.measure import MLP, READINGS, GroundingMeasures
from hooked_alm.experiments.grounding.settings import SPANS, GroundingConfig
from hooked_alm.experiments.materials.conflict_runs import INPUTS, ExchangedRun, PatchRun, PromptRun
from hooked_alm.experiments.materials.recordings import Recording
from hooked_alm.methods.patching.options import Engine
from hooked_alm.methods.reading.labels import LabelSet
from tiny import TinyModels, hf_inputs
from tolerances import FAST_ENGINE

LABELS = LabelSet(names=("sad", "glad"), spellings=(((5,),), ((9,),)), mode="first_token")
TEXT, KIMI = ultravox.CASES[0], kimi_audio.WITHOUT_WHISPER


@dataclass(frozen=True)
class Family:
    """A tiny model, its reference, and an item: a prompt, and what exchanges its inputs."""

    model: HookedALM
    plain: PlainPatching
    base: Inputs
    donors: dict[str, Inputs]


def mixed(two: Inputs, audio: set[str], audio_row: int, text_row: int) -> Inputs:
    """A prompt of a batch's audio and text, each of a row of its own."""

    def taken(name: str) -> Any:
        row = audio_row if name in audio else text_row
        return two[name][row : row + 1]

    return {name: taken(name) for name in two}


def families(two: Inputs, *audio: str) -> tuple[Inputs, dict[str, Inputs]]:
    base, heard, told = (mixed(two, {*audio}, *rows) for rows in ((0, 0), (1, 0), (0, 1)))
    return base, {"audio_swap": heard, "text_swap": told}


def of_case(case: Case, folder: Path, layers: str, *audio: str) -> Family:
    folder.mkdir(parents=True)
    case.save(folder, torch.float32)
    model = HookedALM.from_pretrained(folder, components=case.components(folder))
    reference: Any = case.reference(folder, torch.float32, "sdpa")
    stack = reference
    for name in layers.split("."):
        stack = getattr(stack, name)
    clip = case.clips[1]
    base, donors = families(case.inputs([[clip], [clip]], [9, 9]), *audio)
    plain = PlainPatching(stack, lambda x: reference.run(x)["logits"], model.cfg.d_head)
    return Family(model, plain, base, donors)


@pytest.fixture(scope="module")
def made(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    hf = tiny_models.hf("gqa")
    two = with_positions(hf_inputs([[60], [60]], [9, 9]))
    heard = ("input_features", "feature_attention_mask")
    root = tmp_path_factory.mktemp("families")
    return {
        "Qwen2-Audio": Family(
            tiny_models.hooked("gqa"),
            PlainPatching(hf.model.language_model.layers, lambda x: hf(**x).logits, 10),
            *families(two, *heard),
        ),
        "Ultravox": of_case(TEXT, root / "a/model", "lm.model.layers", "audio_values"),
        "Kimi-Audio": of_case(
            KIMI, root / "b/model", "trunk.layers",
            *("input_ids", "whisper_input_feature", "is_continuous_mask"),
        ),
    }  # fmt: skip


def item() -> ExchangedRun:
    clip = Recording(
        name="clip", path=Path("clip.wav"), cells={"emotion": "sad", "language": "en"}, seconds=1.0,
        sampling_rate=16000, channels=1, codec="WAV/PCM_16", sha256="", where="",
    )  # fmt: skip
    base = PromptRun(clip, "en", "conflict", "glad", ("glad",))
    return ExchangedRun(
        base,
        (
            PatchRun(base, base, "audio_swap", ("glad", "sad")),
            PatchRun(base, base, "text_swap", ("sad", "glad")),
        ),
    )


def measured(family: Family, engine: Engine) -> dict[str, pd.DataFrame]:
    config = GroundingConfig(engine=engine, min_effect=1e-3)
    measures = GroundingMeasures(family.model, LABELS, config)
    donors = {
        name: family.model.encode(**family.donors[kind]) for name, kind in INPUTS.items()
    }  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {"grounding": [], "nodes": []}
    for table, n, row in measures.cells([item()], family.model.encode(**family.base), donors):
        assert n == 0
        found[table].append(row)
    return {table: pd.DataFrame(rows) for table, rows in found.items()}


def metric(logits: Tensor, kind: str) -> Tensor:
    """Lead of the label that the exchange calls for, of every row."""
    lead = logits[:, 9] - logits[:, 5]
    return lead if kind == "audio_swap" else -lead


def expected(family: Family, site: Site, cells: pd.DataFrame) -> np.ndarray:
    """Effects of audio and text in every cell of a site and a reading."""
    spans = family.model.encode(**family.base).spans
    [reading] = set(cells.direction)
    wanted = [
        (
            [i for part in SPANS[row["span"]] for i in spans.positions(part, 0)],
            row["head"] if row.get("head", MLP) != MLP else None,
        )
        for row in cells.to_dict("records")
    ]
    columns = []
    for kind, donor in family.donors.items():
        sides = (family.base, donor) if reading == "denoise" else (donor, family.base)
        start = metric(family.plain.logits(sides[0]), kind)
        moved = metric(family.plain.patched(*sides, site, wanted), kind) - start
        columns.append(moved if reading == "denoise" else -moved)
    return torch.stack(columns, dim=1).numpy()


def total_effects(family: Family) -> list[float]:
    start = family.plain.logits(family.base)
    return [
        float(metric(family.plain.logits(x), kind) - metric(start, kind))
        for kind, x in family.donors.items()
    ]


by_family = pytest.mark.parametrize("name", ["Qwen2-Audio", "Ultravox", "Kimi-Audio"])


@by_family
def test_every_cell_agrees_with_plain_transformers(made: dict[str, Family], name: str) -> None:
    family = made[name]
    n_blocks, n_heads = len(family.plain.layers), family.model.cfg.n_heads
    found, te = measured(family, "fast"), total_effects(family)
    assert min(map(abs, te)) > 0.01
    nodes = found["nodes"].assign(is_mlp=lambda x: x["head"] == MLP)
    groups = [
        *((("resid", depth), part) for (depth, _), part in
          found["grounding"].groupby(["depth", "direction"])),
        *((("mlp_out" if is_mlp else "z", block), part) for (is_mlp, block, _), part in
          nodes.groupby(["is_mlp", "block", "direction"])),
    ]  # fmt: skip
    assert len(groups) == 2 * (3 * n_blocks + 1)
    assert sum(len(part) for _, part in groups) == 2 * (
        5 * (n_blocks + 1) + n_blocks * (n_heads + 1)
    )
    for site, cells in groups:
        effects = expected(family, site, cells)
        close = {"rtol": 0, "atol": ROUNDING}
        np.testing.assert_allclose(cells[["effect_audio", "effect_text"]], effects, **close)
        np.testing.assert_allclose(cells[["te_audio", "te_text"]], [te] * len(cells), **close)
        np.testing.assert_allclose(cells[["rec_audio", "rec_text"]], effects / te, rtol=0,
                                   atol=12 * ROUNDING / min(map(abs, te)))  # fmt: skip
    cells = pd.concat([part for _, part in groups])
    audio, text = (cells[f"effect_{one}"].clip(lower=0) for one in ("audio", "text"))
    total = audio + text
    np.testing.assert_array_equal(cells.gc, (audio / total).where(total >= 1e-3))
    assert 0 < cells.gc.notna().sum() < len(cells)


@by_family
def test_i8_the_whole_prompt_at_depth_0_is_the_behavioural_share(
    made: dict[str, Family], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = GroundingMeasures.sites
    monkeypatch.setattr(GroundingMeasures, "sites", lambda self: itertools.islice(every(self), 1))
    family, te = made[name], total_effects(made[name])
    cells = measured(family, "hooks")["grounding"]
    assert {*cells.depth} == {0}
    whole = cells[cells.span == "all"]
    assert whole.direction.tolist() == [*READINGS]
    assert whole[["effect_audio", "effect_text"]].to_numpy().tolist() == [te] * 2
    moved = [max(one, 0.0) for one in te]
    assert sum(moved) > 1e-3
    assert whole.gc.tolist() == [moved[0] / sum(moved)] * 2
    # The audio's span is all that its exchange changes; words are in readout and sink here, too.
    own = cells[cells.span == "audio"][["effect_audio", "effect_text"]].to_numpy()
    assert own[:, 0].tolist() == [te[0]] * 2


ROUNDING = 4 * FAST_ENGINE[torch.float32]
"""Of an effect, a difference of four scores."""
