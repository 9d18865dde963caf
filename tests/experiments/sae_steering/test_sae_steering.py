"""SAE steering on a tiny Whisper: choice and edits against Hugging Face's, and as a whole."""

from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from hooked_alm.converters.dictionaries import load_dictionary, save_dictionary
from hooked_alm.errors import InputError
from hooked_alm.experiments.sae_steering.experiment import SAESteering
from hooked_alm.experiments.sae_steering.plan import SHIFTS
from hooked_alm.experiments.sae_steering.settings import SAESteeringConfig
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.executors import Processes
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.methods.dictionary.autoencoder import DictionaryConfig, SparseAutoencoder
from hooked_alm.methods.dictionary.splice import splice_hooks
from hooked_alm.methods.dictionary.steering import suppress
from noise_clips import noise_table
from stopped_runs import interrupted
from tiny import TinyModels
from whisper_toy import END, Whispers

LAST = 2
"""The encoder's last block."""
POINT = f"audio.encoder.blocks.{LAST}.hook_resid_post"
TEXTS = ("two cats", "", "a dog", "", "a cat", "", "the dog", "")
SECONDS = [0.3 + 0.08 * i for i in range(len(TEXTS))]
K, N, ALPHAS, N_NEW = 6, 4, (1.0, 40.0), 12
SETTINGS: dict[str, Any] = {
    "n_resamples": 1000, "max_new_tokens": N_NEW, "language": "en", "batch_size": 4,
    "n_latents": N, "n_random": 2, "further_alphas": ALPHAS[1:], "normaliser": "none",
}  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips, in four of which nothing is said."""
    folder = tmp_path_factory.mktemp("spoken")
    speakers = [f"s{i // 2}" for i in range(len(TEXTS))]
    return noise_table(folder, SECONDS, sentence=TEXTS, speaker=speakers)


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of random directions, about the rows' width."""
    cfg = DictionaryConfig(d_in=48, d_sae=40, architecture="topk", k=K)
    rows = torch.randn(60, 48, generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("dictionary") / "sae"
    save_dictionary(SparseAutoencoder.initialised(cfg, rows, 3), folder, point=POINT, model="tiny")
    return folder


def experiment(model: Path, table: Path, dictionary: Path, **changes: Any) -> SAESteering:
    where = {"model": str(model), "audio": str(table), "dictionary": str(dictionary)}
    return SAESteering(SAESteeringConfig(**{**where, **SETTINGS, **changes}))


@pytest.fixture(scope="module")
def run(
    small_figures: None,
    whispers: Whispers,
    table: Path,
    dictionary: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> RunFolder:
    out = tmp_path_factory.mktemp("run") / "run"
    return runner.run(experiment(whispers.folder(), table, dictionary), out)


@pytest.fixture
def unpaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the rest."""
    monkeypatch.setattr(SAESteering, "page", lambda self, page, run: None)


# --- By Hugging Face alone


class Reference:
    """Hugging Face's Whisper and a dictionary's formulas, written out."""

    def __init__(self, whispers: Whispers, table: Path, dictionary: Path) -> None:
        self.hf, self.model = whispers.hf(), whispers.hooked()
        self.sae = load_dictionary(dictionary).sae
        self.prompts = {
            f"c{n}": self.model.prepare(table.parent / f"c{n}.wav", language="en")
            for n in range(len(TEXTS))
        }

    def features(self, rows: Tensor) -> Tensor:
        """One row at a time."""
        found = torch.zeros(len(rows), 40)
        for row, x in enumerate(rows):
            pre = self.sae.encoder @ (x - self.sae.b_dec) + self.sae.b_enc
            for latent in pre.argsort(descending=True)[:K]:
                found[row, latent] = max(pre[latent], 0)
        return found

    def n_rows(self, clip: str) -> int:
        """Rows that hear a clip: 20 ms each."""
        return ceil(round(SECONDS[int(clip[1:])] / 0.02, 6))

    @torch.no_grad()
    def rows(self, clip: str) -> Tensor:
        """What the last block puts out, before the final norm, where the clip is heard."""
        kept: list[Tensor] = []
        layer = self.hf.model.encoder.layers[LAST]
        handle = layer.register_forward_hook(lambda module, args, out: kept.append(hidden(out)))
        self.hf.model.encoder(self.prompts[clip].clips[0].features)
        handle.remove()
        return kept[0][0, : self.n_rows(clip)]

    @torch.no_grad()
    def says(self, clip: str, edit: Any) -> list[int]:
        """Greedy tokens with the rows that hear the clip edited, one whole pass for every token."""
        n, x = self.n_rows(clip), self.prompts[clip]

        def changed(module: Any, args: Any, out: Any) -> Any:
            value = hidden(out).clone()
            value[0, :n] = edit(value[0, :n])
            return (value, *out[1:]) if isinstance(out, tuple) else value

        handle = self.hf.model.encoder.layers[LAST].register_forward_hook(changed)
        memory = self.hf.model.encoder(x.clips[0].features).last_hidden_state
        handle.remove()
        ids = x.tokens
        for _ in range(N_NEW):
            logits = self.hf(decoder_input_ids=ids, encoder_outputs=(memory,)).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        said: list[int] = ids[0, x.shape[1] :].tolist()
        return said[: said.index(END)] if END in said else said

    def text(self, said: list[int]) -> str:
        found: str = self.model.tokenizer.decode(said, skip_special_tokens=True)
        return found.strip()


def hidden(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


@pytest.fixture(scope="module")
def reference(whispers: Whispers, table: Path, dictionary: Path) -> Reference:
    return Reference(whispers, table, dictionary)


def latents(run: RunFolder, arm: str, draw: int = 0) -> list[int]:
    table = run.read_table("latents")
    found: list[int] = table[(table.arm == arm) & (table.draw == draw)]["latent"].tolist()
    return found


def test_features_are_chosen_on_other_clips(run: RunFolder, reference: Reference) -> None:
    """By means over all rows of a kind, which Hugging Face and a loop give."""
    chosen, tested = run.read_table("chosen"), run.read_table("transcripts")
    assert {*chosen["clip"]} | {*tested["clip"]} == {*reference.prompts}
    assert not {*chosen["clip"]} & {*tested["clip"]}
    means = []
    for holds in ("no_speech", "speech"):
        some = chosen["clip"][chosen.holds == holds]
        assert len(some) == len(tested[tested.holds == holds]) == 2
        rows = torch.cat([reference.rows(clip) for clip in some])
        means.append((reference.features(rows).mean(0), rows))
    (silent, _), (spoken, _) = means
    assert latents(run, "features") == (silent - spoken).argsort(descending=True)[:N].tolist()
    own = run.read_table("latents")
    own = own[own.arm == "features"]
    best = own["latent"].tolist()
    np.testing.assert_allclose(own.mean_no_speech, silent[best], atol=1e-4)
    np.testing.assert_allclose(own.mean_speech, spoken[best], atol=1e-4)
    for draw in range(2):
        assert not {*latents(run, "random", draw)} & {*best}
        assert len({*latents(run, "random", draw)}) == N


@torch.no_grad()
def test_rows_are_changed_as_in_hugging_face(run: RunFolder, reference: Reference) -> None:
    """Every arm, token by token: the formulas written out, in hooks on Hugging Face's encoder."""
    sae, table = reference.sae, run.read_table("steered")
    own = run.read_table("transcripts").set_index("clip").text
    chosen = run.read_table("chosen")
    means = [
        torch.cat([reference.rows(clip) for clip in chosen["clip"][chosen.holds == holds]]).mean(0)
        for holds in ("speech", "no_speech")
    ]
    silent = torch.cat(
        [reference.rows(clip) for clip in chosen["clip"][chosen.holds == "no_speech"]]
    )
    activity = reference.features(silent).mean(0)
    n_changed = 0
    for (arm, draw, alpha), some in table.groupby(["arm", "draw", "alpha"]):
        is_shift, along = arm in SHIFTS, means[0] - means[1]
        taken = latents(run, "features" if is_shift else arm, draw)
        if arm == "random_shift":
            others = [i for draw in range(2) for i in latents(run, "random", draw)]
            along = -sum(activity[i] * sae.W_dec[i] for i in others)

        def edit(
            x: Tensor, arm: str = arm, taken: Any = taken, alpha: float = alpha, along: Any = along
        ) -> Tensor:
            f = reference.features(x)
            if arm == "reconstruction":
                return f @ sae.W_dec + sae.b_dec
            part = alpha * sum(f[:, [i]] * sae.W_dec[i] for i in taken)
            size = part.norm(dim=-1, keepdim=True)
            return x + size * along / along.norm() if arm in SHIFTS else x - part

        for one in some.head(2).to_dict("records"):
            said, rows = reference.says(one["clip"], edit), reference.rows(one["clip"])
            assert one["text"] == reference.text(said), (arm, alpha)
            far = (edit(rows) - rows).norm(dim=-1).sum() / rows.norm(dim=-1).sum()
            assert one["moved"] == pytest.approx(float(far), rel=1e-3, abs=1e-9)
            n_changed += one["text"] != own[one["clip"]]
    assert n_changed
    assert set(run.read_table("controls").verdict) == {"pass"}


@torch.no_grad()
def test_a_splice_at_every_step(run: RunFolder, reference: Reference) -> None:
    """Hooks under which the clip is heard anew for every token say what hearing it once does."""
    table, model = run.read_table("steered"), reference.model
    mine = table[(table.arm == "features") & (table.alpha == ALPHAS[1])].set_index("clip")["text"]
    edit = suppress(reference.sae, torch.tensor(latents(run, "features")), ALPHAS[1])
    for clip in mine.index[:2]:
        x = reference.prompts[clip]
        hooks, said = splice_hooks(model, x, {POINT: edit}), list[int]()
        while len(said) < N_NEW and END not in said:
            y = x.extend(torch.tensor([said], dtype=torch.long)) if said else x
            said += model.run_with_hooks(y, fwd_hooks=hooks)[:, -1].argmax(-1).tolist()
        assert reference.text(said) == mine[clip]


# --- As a run


def test_rates_by_hand(run: RunFolder) -> None:
    table, own = run.read_table("steered"), run.read_table("transcripts")
    found = run.read_table("steering").set_index(["arm", "alpha"])
    assert (found.index[0], len(found)) == (("nothing", 0.0), 1 + 5 * len(ALPHAS) + 1)
    for (arm, alpha), row in found.iterrows():
        mine = table[(table.arm == arm) & (table.alpha == alpha)]
        mine = own if arm == "nothing" else mine
        silent, spoken = mine[mine.holds == "no_speech"], mine[mine.holds == "speech"]
        assert row.fpr_mean == pytest.approx(silent.heard.mean())
        counts = spoken[[f"reference_{n}" for n in ("substitutions", "deletions", "insertions")]]
        rate = counts.to_numpy().sum() / spoken.reference_n.sum()
        assert row.wer_mean == pytest.approx(rate)
        assert row.words == pytest.approx(silent.reference_insertions.mean())
    counts = run.read_table("phrases").groupby("when").clips.sum()
    assert counts.to_dict() == {"as it is": 2, "features taken out": 2}


@pytest.mark.usefixtures("unpaged")
def test_stopped_or_in_two_processes_it_leaves_the_same_bytes(
    run: RunFolder, whispers: Whispers, table: Path, dictionary: Path, tmp_path: Path
) -> None:
    def again() -> SAESteering:
        return experiment(whispers.folder(), table, dictionary)

    tables = {path.name: path.read_bytes() for path in run.path.glob("tables/*")}
    for stop in ({1}, {7}):  # among the clips that features are chosen on, and among the steered
        with pytest.raises(KeyboardInterrupt):
            runner.run(interrupted(again(), stop), tmp_path / "stopped")
    for name, executor in (("stopped", {}), ("two", {"executor": Processes(2)})):
        found = runner.run(again(), tmp_path / name, **executor)
        assert {p.name: p.read_bytes() for p in found.path.glob("tables/*")} == tables


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"point": "blocks.0.hook_resid_post"}, "a dictionary of blocks.0.hook_resid_post"),
        ({"point": "audio.encoder.blocks.0.mlp.hook_post"}, "of rows of width 48, expected 56"),
        ({"n_latents": 21}, "the dictionary has 40, expected twice as many"),
    ],
)
def test_a_dictionary_that_does_not_go_with_it(
    settings: dict[str, Any],
    message: str,
    whispers: Whispers,
    table: Path,
    dictionary: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError, match=message):
        runner.run(experiment(whispers.folder(), table, dictionary, **settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"speaker": ["a", "b", "c"]}, {}, "the table of clips has no column text"),
        ({"text": ["a cat", "two", ""]}, {}, "got 1 clips without words, expected two or more"),
        ({"text": ["a", "b", ""]}, {"cluster": "speaker"}, "line 2: speaker: missing"),
        ({"sentence": ["a", "", "b"], "sha256": ["", "", "00"]}, {}, "line 4: sha256: got 00"),
    ],
)
def test_clips_that_do_not_do(
    columns: dict[str, Any],
    settings: dict[str, Any],
    message: str,
    whispers: Whispers,
    dictionary: Path,
    tmp_path: Path,
) -> None:
    own = noise_table(tmp_path, [0.3, 0.4, 0.5], **columns)
    with pytest.raises(InputError, match=message):
        runner.run(experiment(whispers.folder(), own, dictionary, **settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_that_does_not_transcribe(
    tiny_models: TinyModels, table: Path, dictionary: Path, tmp_path: Path
) -> None:
    given = experiment(tiny_models.folder(), table, dictionary, language=None)
    with pytest.raises(InputError, match="expected one that transcribes.*sae_patching"):
        runner.run(given, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_speakers_are_on_one_side(
    whispers: Whispers, table: Path, dictionary: Path, tmp_path: Path
) -> None:
    """Of either kind of clips, where speakers are resampled."""
    given = experiment(whispers.folder(), table, dictionary, cluster="speaker")
    given.folder = RunFolder(tmp_path / "run")
    parts = pd.Series(given.identify()["parts"])
    for kind in (0, 1):
        assert parts[[f"c{n}" for n in range(kind, 8, 2)]].value_counts().to_dict() == {
            "discovery": 2, "held-out": 2
        }  # fmt: skip
