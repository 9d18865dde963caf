"""Time what ``emotion_conflict`` reads of a batch against a plain Hugging Face loop.

Both models hold the same random weights, 12 layers of width 512, in one process; calls alternate,
so that noise of the machine hits both. Ours is everything that a unit does with a batch: the hooked
run, lens, fidelity of the lens, attention by segment, and the rows of the tables. Hugging Face's is
the forward that a script would make, with ``output_hidden_states``, over the same batch; both
decode audio that was embedded beforehand. Prints medians of the pairwise ratios with their
bootstrap interval, and that of single prompts against a batch of them.

    python scripts/bench_experiment.py [--pairs 30] [--rows 1 8] [--positions 200]

``bench_head_statistics.py`` does the same for ``head_statistics``.
"""

import argparse
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bench_forward import MEL_FRAMES, make_checkpoint, paired_ratio
from transformers import Qwen2AudioForConditionalGeneration

from hooked_alm import ALMInput, HookedALM
from hooked_alm.experiments.emotion_conflict.measure import ConflictMeasures
from hooked_alm.experiments.emotion_conflict.settings import EmotionConflictConfig
from hooked_alm.experiments.materials.conflict_runs import PromptRun
from hooked_alm.experiments.materials.recordings import Recording
from hooked_alm.methods.reading.labels import LabelSet
from hooked_alm.methods.reading.lens import LogitLens

NAMES = ("sad", "angry", "neutral")


def prompts(model: HookedALM, n_rows: int, n_pos: int) -> ALMInput:
    """Left-padded prompts of unequal length, all but 50 positions of each audio."""
    assert model.audio is not None
    placeholder = model.audio.tokens.placeholder
    ids, frames = [], []
    for row in range(n_rows):
        n = n_pos - row * (n_pos // (5 * n_rows))
        n_audio = model.audio.n_tokens(4 * (n - 50))
        frames.append(4 * (n - 50))
        ids.append(
            [0] * (n_pos - n) + [1] * 25 + [placeholder] * n_audio + [2] * (n - n_audio - 25)
        )
    mask = torch.tensor([[int(token != 0) for token in row] for row in ids])
    return model.encode(
        input_ids=torch.tensor(ids),
        attention_mask=mask,
        input_features=torch.randn(n_rows, model.audio.feature_shape[0], MEL_FRAMES),
        feature_attention_mask=(torch.arange(MEL_FRAMES) < torch.tensor(frames)[:, None]).long(),
    )


def measures_of(model: HookedALM) -> ConflictMeasures:
    """The experiment's read-outs, for three labels."""
    words: Any = SimpleNamespace(decode=lambda ids: str(ids))
    model.tokenizer = words
    labels = LabelSet(names=NAMES, spellings=(((5,),), ((6,),), ((7,),)), mode="first_token")
    config = EmotionConflictConfig(n_resamples=1000)
    return ConflictMeasures(model, LogitLens("final"), labels, config)


def runs_of(n: int) -> list[PromptRun]:
    """Runs that prompts could be of."""
    clip = Recording(
        name="clip", path=Path("clip.wav"), cells={"emotion": "sad", "language": "en"}, seconds=3.0,
        sampling_rate=16000, channels=1, codec="WAV/PCM_16", sha256="", where="",
    )  # fmt: skip
    return [PromptRun(clip, "en", "conflict", "angry", ("angry",))] * n


@torch.no_grad()
def bench(folder: Path, rows: list[int], n_pos: int, n_pairs: int) -> None:
    """Prints a line for every number of rows, then one for batches against single prompts."""
    hf = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    model = HookedALM.from_pretrained(str(folder))
    measures = measures_of(model)
    for n_rows in rows:
        x = prompts(model, n_rows, n_pos)
        _, cache = model.run_with_cache(x, names_filter="hook_embed")
        plain = {
            "inputs_embeds": cache["hook_embed"],
            "attention_mask": x.attention_mask,
            "position_ids": x.position_ids,
        }
        runs = runs_of(n_rows)
        # The same answers, to the bit.
        theirs = hf(**plain, use_cache=False).logits[:, -1, [5, 6, 7]]
        ours = [row["runs"][0] for row, _ in measures.runs(runs, x)]
        assert [[row[f"z_{name}"] for name in NAMES] for row in ours] == theirs.tolist()

        def loop(plain: dict[str, torch.Tensor] = plain) -> None:
            hf(**plain, use_cache=False, output_hidden_states=True)

        ratio = paired_ratio(lambda x=x, r=runs: measures.runs(r, x), loop, n_pairs)
        print(f"{n_rows} x {n_pos}: ours / HF with hidden states  {ratio}")
        if n_rows > 1:
            single = [x[row] for row in range(n_rows)]
            one_by_one = paired_ratio(
                lambda x=x, r=runs: measures.runs(r, x),
                lambda s=single, r=runs: [measures.runs(r[:1], one) for one in s],
                max(n_pairs // 3, 3),
            )
            print(f"{n_rows} x {n_pos}: as a batch / one by one         {one_by_one}")


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--positions", type=int, default=200)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        make_checkpoint(Path(scratch))
        bench(Path(scratch), options.rows, options.positions, options.pairs)


if __name__ == "__main__":
    main()
