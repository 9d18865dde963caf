"""What said words lose: against Hugging Face's Whisper under a PyTorch hook, teacher-forced."""

import csv
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import soundfile
import torch
from torch import Tensor
from torch.nn import functional as F

from circuits_toy import write_tones
from hooked_alm.experiments.materials.recovered_answers import ablations, word_rows
from hooked_alm.experiments.sae_train.experiment import TrainDictionaries
from hooked_alm.experiments.sae_train.settings import SAETrainConfig
from hooked_alm.experiments.sae_train.tables import words_table
from hooked_alm.experiments.workbench.intervals import Draws
from hooked_alm.methods.dictionary.autoencoder import DictionaryConfig, SparseAutoencoder
from whisper_toy import Whispers, extractor

POINT = "audio.encoder.blocks.1.hook_resid_post"
SAID = ("and so it is", "", "never again", "one or two of them")


@pytest.fixture
def trained(whispers: Whispers, tmp_path: Path) -> TrainDictionaries:
    """Four clips of four speakers, of which one says nothing."""
    names = write_tones(tmp_path, 4)
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "speaker", "text"])
        table.writerows(zip(names, "abcd", SAID, strict=True))
    one = TrainDictionaries(SAETrainConfig(
        model=str(whispers.folder()), audio=str(tmp_path), points=[POINT], language="en",
        step_rows=4, n_rows=8, k=2, held_out_share=0.75,
    ))  # fmt: skip
    one.identify()
    one.load()
    return one


def replaced(module: Any, args: Any, out: Tensor, *, edit: Any, n_heard: int) -> Tensor:
    changed = out.clone()
    changed[0, :n_heard] = edit(out[0, :n_heard])
    return changed


@torch.no_grad()
def test_cross_entropy_of_words(trained: TrainDictionaries, whispers: Whispers) -> None:
    rows, split = trained.rows, trained.split
    every = rows.values(split.held_out)[POINT]
    cfg = DictionaryConfig(d_in=48, d_sae=30, architecture="topk", k=4)
    sae = SparseAutoencoder.initialised(cfg, every, seed=0)
    without = ablations(rows, split, POINT)  # type: ignore[arg-type]
    found = [*word_rows(rows, split, POINT, {0: sae}, without)]  # type: ignore[arg-type]
    assert [row["clip"] for row in found] == [
        rows.clips[i].name for i in split.held_out if rows.clips[i].cells.get("text")
    ]
    mean = every.mean(0)
    edits: dict[str, Any] = {
        "ce": sae, "ce_mean": lambda x: mean.expand_as(x), "ce_zero": torch.zeros_like,
        "ce_clean": lambda x: x, "ce_kept": lambda x: x,
    }  # fmt: skip
    hf, clips = whispers.hf(), {clip.name: i for i, clip in enumerate(rows.clips)}
    for row in found:
        clip: Any = rows.clips[clips[row["clip"]]]
        n_heard = rows.n_rows[clips[row["clip"]]]
        samples, _ = soundfile.read(clip.path, dtype="float32")
        features = extractor()(samples, sampling_rate=16_000, return_tensors="pt").input_features
        x = rows.heard([clips[row["clip"]]])  # type: ignore[attr-defined]
        ids = trained.model.tokenizer(" " + clip.cells["text"], add_special_tokens=False).input_ids
        tokens = torch.cat([x.tokens, torch.tensor([ids])], dim=1)
        assert row["n_tokens"] == len(ids)
        for column, edit in edits.items():
            hook = partial(replaced, edit=edit, n_heard=n_heard)
            handle = hf.model.encoder.layers[1].register_forward_hook(hook)
            logits = hf(input_features=features, decoder_input_ids=tokens).logits
            handle.remove()
            expected = F.cross_entropy(logits[0, x.shape[1] - 1 : -1], torch.tensor(ids))
            assert row[column] == pytest.approx(float(expected), rel=1e-5)
        assert row["ce_kept"] == row["ce_clean"]
        assert len({row[name] for name in ("ce", "ce_clean", "ce_mean", "ce_zero")}) == 4


def test_recovered_words_by_hand() -> None:
    columns = {"n_tokens": 3, "ce_kept": 1.0, "point": POINT, "seed": 0}
    words = pd.DataFrame([
        {"clip": f"c{i}", "group": f"g{i}", "ce": 2.0 + i, "ce_clean": 1.0 + i, "ce_mean": 5.0 + i,
         "ce_zero": 3.0 + i, **columns}
        for i in range(3)
    ])  # fmt: skip
    found = words_table(words, Draws(0, 1000)).iloc[0]
    assert found["recovered_mean"] == pytest.approx((3 - 6) / (2 - 6))
    assert found["recovered_zero"] == pytest.approx((3 - 4) / (2 - 4))
    assert (found["ce"], found["n_groups"]) == (3.0, 3)
    assert words_table(words[:0], Draws(0, 1000)).empty
