"""``transcript_probes`` as a whole: tiny models against Hugging Face's, and what is planted."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from hooked_alm.errors import InputError
from hooked_alm.experiments.materials.clips import ClipFile
from hooked_alm.experiments.transcript_probes.experiment import TranscriptProbes
from hooked_alm.experiments.transcript_probes.plan import value_of
from hooked_alm.experiments.transcript_probes.settings import TranscriptProbesConfig
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.executors import Processes
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.reading.transcripts import written
from hooked_alm.points import hook_name
from noise_clips import noise_table
from stopped_runs import interrupted
from tiny import TinyModels
from tolerances import ENCODER_BATCH
from whisper_toy import END, IDS, LAYERS, START, Whispers

N, N_SPEAKERS, N_NEW = 24, 4, 12
SPOKEN = [n % 3 > 0 for n in range(N)]
"""Two clips of three hold words."""
CLOSE = {"atol": ENCODER_BATCH[torch.float32], "rtol": 0}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 clips of four speakers; in eight of them nothing is said, by nobody."""
    return noise_table(
        tmp_path_factory.mktemp("clips"), [0.3 + 0.1 * (n % 4) for n in range(N)],
        speaker=[f"s{n % N_SPEAKERS}" if SPOKEN[n] else "nobody" for n in range(N)],
        sentence=[f"two cats {n}" if SPOKEN[n] else "" for n in range(N)],
    )  # fmt: skip


def config(model: Path, table: Path, **changes: Any) -> TranscriptProbesConfig:
    given: dict[str, Any] = {
        "n_resamples": 1000, "n_folds": 3, "max_new_tokens": N_NEW, "batch_size": 5,
        "normaliser": "none", "language": "en",
    }  # fmt: skip
    return TranscriptProbesConfig(model=str(model), audio=str(table), **{**given, **changes})


@pytest.fixture(scope="module")
def run(
    small_figures: None, whispers: Whispers, table: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    out = tmp_path_factory.mktemp("run") / "run"
    return runner.run(TranscriptProbes(config(whispers.folder(), table)), out)


@pytest.fixture
def unpaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the rest."""
    monkeypatch.setattr(TranscriptProbes, "page", lambda self, page, run: None)


def kept(run: RunFolder, name: str) -> np.ndarray:
    files = sorted(run.path.glob("arrays/transcripts__*.safetensors"))
    return np.concatenate([load_file(file)[name] for file in files])


class HfDecoder:
    """Hugging Face's decoder on one clip, and its stream by plain hooks."""

    @torch.no_grad()
    def __init__(self, whispers: Whispers, path: Path) -> None:
        self.hf: Any = whispers.hf()
        self.model = whispers.hooked()
        x = self.model.prepare(path, language="en")
        self.prompt = x.tokens
        self.memory = self.hf.model.encoder(x.clips[0].features).last_hidden_state
        self.stream: dict[int, Tensor] = {}

    def logits(self, ids: Tensor) -> Tensor:
        found: Tensor = self.hf(decoder_input_ids=ids, encoder_outputs=(self.memory,)).logits
        return found[0]

    @torch.no_grad()
    def greedy(self) -> list[int]:
        ids = self.prompt
        for _ in range(N_NEW):
            ids = torch.cat([ids, self.logits(ids)[-1:].argmax(-1)[None]], dim=1)
        said: list[int] = ids[0, self.prompt.shape[1] :].tolist()
        return said[: said.index(END)] if END in said else said

    def along(self, said: Sequence[int]) -> Tensor:
        """Logits of prompt and transcript; the stream at the last position is kept."""

        def before(module: Any, args: tuple[Tensor]) -> None:
            self.stream[0] = args[0][0, -1]

        def behind(module: Any, args: Any, output: Any, depth: int) -> None:
            value = output[0] if isinstance(output, tuple) else output
            self.stream[depth] = value[0, -1] if value.ndim == 3 else value[-1]

        blocks = self.hf.model.decoder.layers
        handles = [blocks[0].register_forward_pre_hook(before)]
        for depth, block in enumerate(blocks, 1):
            handles.append(block.register_forward_hook(
                lambda module, args, output, depth=depth: behind(module, args, output, depth)
            ))  # fmt: skip
        found = self.logits(torch.cat([self.prompt, torch.tensor([said], dtype=torch.long)], 1))
        for handle in handles:
            handle.remove()
        return found


# --- What is measured


@torch.no_grad()
def check(
    hf: HfDecoder, said: list[int], row: Any, features: Callable[[str], np.ndarray], n: int
) -> None:
    """States by plain hooks; what needs no state by hand."""
    logits, model = hf.along(said), hf.model
    for depth, name in enumerate(model.depth_names()):
        np.testing.assert_allclose(features(name), hf.stream[depth], **CLOSE)
    text = model.tokenizer.decode(said, skip_special_tokens=True).strip()
    targets = torch.tensor([*said, END][:N_NEW])
    log_p = logits[hf.prompt.shape[1] - 1 :].log_softmax(-1)[: len(targets)]
    no_speech = hf.logits(torch.tensor([[START]]))[0].softmax(-1)[IDS["<|nospeech|>"]]
    expected = {
        "n_tokens": float(len(said)),
        "mean_log_p": float(log_p.gather(-1, targets[:, None]).mean()),
        "compression_ratio": len(text.encode()) / len(zlib.compress(text.encode())),
        "no_speech": float(no_speech),
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, abs=1e-5), name
        np.testing.assert_allclose(features(name), [value], rtol=1e-4)
    every = [0.3 + 0.1 * (n % 4), *expected.values()]
    np.testing.assert_allclose(features("together"), every, rtol=1e-4)
    assert (row["text"], row["ended"]) == (text, float(len(said) < N_NEW))
    assert row["holds"] == ("speech" if SPOKEN[n] else "no_speech")


def test_states_are_those_where_hugging_face_ends_the_transcript(
    run: RunFolder, whispers: Whispers, table: Path
) -> None:
    rows = run.read_table("transcripts").set_index("clip")
    for n in (0, 4, 9, 17, 23):
        hf = HfDecoder(whispers, table.parent / f"c{n}.wav")
        check(hf, hf.greedy(), rows.loc[f"c{n}"], lambda name, n=n: kept(run, name)[n], n)
    assert {*run.read_table("controls").verdict} == {"pass"}


def test_transcripts_of_a_batch_end_where_each_does(whispers: Whispers, table: Path) -> None:
    """One is empty, one is cut off, and others are in between."""
    experiment = TranscriptProbes(config(whispers.folder(), table))
    experiment.identify()
    experiment.load()
    clips = experiment.ours.clips[:4]
    said = [[], [*range(40, 43)], [*range(50, 50 + N_NEW)], [61]]
    found = experiment.along(clips, experiment.ours.prompts(clips), said)
    for n, (tokens, (row, features)) in enumerate(zip(said, found, strict=True)):
        hf = HfDecoder(whispers, clips[n].path)
        check(hf, tokens, row, features.__getitem__, n)


def test_labels_are_those_of_the_transcripts(run: RunFolder) -> None:
    """Nothing random is right: error has one class, and the page says why it is not read."""
    reads, rows = run.read_table("reads"), run.read_table("transcripts")
    assert {*reads.label} == {"speech", "hallucination"}
    some = reads[(reads.label == "speech") & (reads.point == "duration")]
    assert some.value.tolist() == ["speech" if spoken else "no_speech" for spoken in SPOKEN]
    # Where no one speaks, a clip is by itself.
    assert some.group.tolist() == [f"s{n % N_SPEAKERS}" if SPOKEN[n] else f"c{n}" for n in range(N)]
    heard = rows[rows.heard == 1]["clip"].tolist()
    some = reads[(reads.label == "hallucination") & (reads.point == "duration")]
    assert some["clip"].tolist() == heard
    assert {*some.value} == {"speech", "hallucination"}
    unread = run.read_table("unread")
    assert unread.label.tolist() == ["error"]
    assert "got ['wrong'] alone" in unread.why[0]
    page = (run.path / "report.html").read_text("utf-8")
    for words in ("error is not read: got", "speech (2 values, 24 clips of 12 groups)",
                  "no-speech probability", "best baseline: ", "Not causal"):  # fmt: skip
        assert words in page
    counted = run.read_table("classes").set_index(["label", "value"]).n
    assert counted["error", "wrong"] == 16
    assert counted["error", "(left out)"] == 8


@pytest.mark.parametrize(
    ("holds", "heard", "rate", "expected"),
    [
        ("speech", 1, 0.0, ("right", "speech", "speech")),
        ("speech", 1, 0.5, ("wrong", "speech", "speech")),
        ("speech", 1, 0.4, ("", "speech", "speech")),
        ("speech", 0, 1.0, ("wrong", "speech", "")),
        ("speech", 1, np.nan, ("", "speech", "speech")),  # nothing is left of what is said
        ("no_speech", 1, np.nan, ("", "no_speech", "hallucination")),
        ("no_speech", 0, np.nan, ("", "no_speech", "")),
    ],
)
def test_what_a_transcript_is_labelled_with(
    holds: str, heard: int, rate: float, expected: tuple[str, ...]
) -> None:
    row = {"holds": holds, "heard": float(heard), "rate": rate}
    labels = ("error", "speech", "hallucination")
    assert tuple(value_of(label, row, 0.5) for label in labels) == expected


# --- What is planted


class Flagged(TranscriptProbes):
    """The model, with y·u added to its stream behind a block, y whether anything is said."""

    first = 0

    def along(
        self, clips: Sequence[ClipFile], x: ALMInput, said: Sequence[Sequence[int]]
    ) -> Iterator[Any]:
        sign = torch.tensor([1.0 if self.ours.said_in(one) else -1.0 for one in clips])
        along = torch.randn(self.model.cfg.d_model, generator=torch.Generator().manual_seed(3))

        def add(value: Tensor, hook: Any) -> Tensor:
            return value + 5 * sign[:, None, None] * along

        name = hook_name("resid_post", f"blocks.{self.first}")
        with self.model.hooks(fwd_hooks=[(name, add)]):
            yield from super().along(clips, x, said)


@pytest.mark.usefixtures("unpaged")
@pytest.mark.parametrize("first", range(LAYERS["decoder"]))
def test_a_flag_is_read_from_where_it_was_added(
    first: int, whispers: Whispers, table: Path, tmp_path: Path
) -> None:
    """M-BT-5: chance below k0, 0.95 and more from k0 on; at another k0 the step moves."""
    experiment = Flagged(config(whispers.folder(), table, labels=("speech",)))
    experiment.first = first
    found = runner.run(experiment, tmp_path / "run")
    probes = found.read_table("probes").set_index("depth").accuracy
    assert sorted(probes.index) == [*range(LAYERS["decoder"] + 1)]
    for depth, accuracy in probes.items():
        assert (accuracy >= 0.95) if depth > first else (accuracy < 0.8), depth
    # A stream that something was added to is not that which wrote the transcripts.
    controls = found.read_table("controls").set_index("control").verdict
    assert controls["the transcript is what one pass finds likeliest"] == "FAIL"


# --- Runs


@pytest.mark.usefixtures("unpaged")
def test_stopped_or_in_two_processes_it_leaves_the_same_bytes(
    run: RunFolder, whispers: Whispers, table: Path, tmp_path: Path
) -> None:
    def again() -> TranscriptProbes:
        return TranscriptProbes(config(whispers.folder(), table))

    def files(path: Path) -> dict[str, bytes]:
        some = [*path.glob("tables/*"), *path.glob("arrays/*")]
        return {f"{one.parent.name}/{one.name}": one.read_bytes() for one in some}

    for stop in ({3}, {9}):  # among the transcripts, and among the probes
        with pytest.raises(KeyboardInterrupt):
            runner.run(interrupted(again(), stop), tmp_path / "stopped")
    for name, executor in (("stopped", {}), ("two", {"executor": Processes(2)})):
        found = runner.run(again(), tmp_path / name, **executor)
        assert files(found.path) == files(run.path)


@pytest.mark.usefixtures("unpaged")
@torch.no_grad()
def test_a_language_model_that_hears(tiny_models: TinyModels, table: Path, tmp_path: Path) -> None:
    """It knows no probability of no speech; its states are those of one prompt by itself."""
    settings = config(tiny_models.folder(), table, language=None, labels=("speech",))
    found = runner.run(TranscriptProbes(settings), tmp_path / "run")
    assert "no_speech" not in {*found.read_table("baselines").point}
    rows = found.read_table("transcripts")
    # Whatever it is: found at the position behind which the next token would be written.
    model, n = tiny_models.hooked(), 7
    x = model.prepare(table.parent / f"c{n}.wav", settings.prompt)
    said = written(model, x, N_NEW)[0]
    assert rows.n_tokens[n] == len(said)
    names = model.depth_names()
    y = x.extend(torch.tensor([said], dtype=torch.long))
    _, cache = model.run_with_cache(y, names_filter=names)
    for name in names:
        np.testing.assert_allclose(kept(found, name)[n], cache[name][0, -1], **CLOSE)


def test_what_cannot_be_probed_is_refused(whispers: Whispers, table: Path, tmp_path: Path) -> None:
    def changed(name: str, change: Any) -> Path:
        path = table.parent / f"{name}.csv"
        rows = pd.read_csv(table, dtype=str, keep_default_na=False)
        change(rows).to_csv(path, index=False)
        return path

    out, folder = tmp_path / "run", whispers.folder()
    wordless = changed("wordless", lambda rows: rows.drop(columns="sentence"))
    unnamed = changed("unnamed", lambda rows: rows.replace({"speaker": {"s1": ""}}))
    for match, given in {
        "the clips have no column text or sentence": config(folder, wordless),
        r"unnamed.csv line 3: speaker: missing": config(folder, unnamed),
        "no column mood": config(folder, table, group="mood"),
        "the table has the column speaker": config(folder, table, cv="random"),
    }.items():
        with pytest.raises(InputError, match=match):
            runner.run(TranscriptProbes(given), out)
        assert not out.exists()
    with pytest.raises(InputError, match=r"probing transcripts: error: got \['wrong'\] alone"):
        runner.run(TranscriptProbes(config(folder, table, labels=("error",))), out)
