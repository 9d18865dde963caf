"""The tables of an ``emotion_conflict`` run, and what is counted and averaged over them.

Source: seed 000; M-000-1, M-000-8, M-000-10, M-000-12 and M-000-13.
"""

from collections.abc import Iterator, Sequence

import pandas as pd

from ..materials.clips import SOUNDS
from ..materials.item_curves import handoffs, means_by
from ..workbench.intervals import rate
from ..workbench.results import Results
from .curves import critical_layer_table, delta_curves, patching_summary
from .settings import EmotionConflictConfig

EmotionResults = Results[EmotionConflictConfig]
TABLES = {
    "runs": "a forward: a clip under an instruction, and what is answered",
    "delta": "Δlogit of a run, for one target, at one depth",
    "depths": "what the lens reads of a run at one depth, and how far it is from the output",
    "attention": "attention of a run's readout to one segment, in one block",
    "patching": "a conflict run with one span of one block exchanged",
    **SOUNDS,
}
MAY_LACK = {
    "patching": (
        *("clip", "target", "voice", "prompt_language", "named", "donor", "donor_clip"),
        *("donor_named", "toward", "block", "span", "prediction", "flip", "shift", "recovery"),
        *("base", "total_effect", "noise"),
    )
}
"""Columns that are read of tables that a run without any donor leaves empty."""
RATIOS = ("fraction", "ratio", "density")
FIDELITY = ("kl", "agrees", "entropy", "residual_norm")
MASSES = ("mass", "density", "mass_without_sink")


def summarise(run: EmotionResults) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every summary but the clips', by the name of its file."""
    draws, who = run.draws, run["runs"][["unit", "clip", "condition", "target"]]
    items, conflict = items_with_delta(run), conflict_items(run["runs"])
    depths, attention = (run[name].merge(who, on="unit") for name in ("depths", "attention"))
    yield "delta_logit_curves", delta_curves(items, draws)
    yield "critical_layers", critical_layer_table(items, run)
    yield "accuracy", accuracy(items)
    yield "ob1_flip_summary", flip_summary(conflict)
    yield "flip_matrix", flip_cells(conflict, run.inputs["labels"])
    yield "lens_fidelity", means_by(depths, FIDELITY, ["condition"], "depth", draws)
    yield "attention_summary", means_by(attention, MASSES, ["condition", "span"], "layer", draws)
    yield "mar", (ratios := attention_ratios(run["attention"], run["runs"]))
    yield "mar_summary", means_by(ratios, RATIOS, ["condition"], "layer", draws)
    yield "patching_summary", patching_summary(run["patching"], draws)
    yield "handoffs", handoffs(run["patching"], "block", draws)


def items_with_delta(run: EmotionResults) -> pd.DataFrame:
    """A row per item, condition and depth: the contrast, the clip, the prediction."""
    return run["delta"].merge(run["runs"].drop(columns="target"), on="unit")


# --- Answers


def conflict_items(runs: pd.DataFrame) -> pd.DataFrame:
    """Labels and both predictions of every conflict item, as the flip measures want them."""
    alone = runs[runs.condition == "audio_only"].set_index("clip").prediction
    conflict = runs[runs.condition == "conflict"].rename(columns={"prediction": "conflict"})
    conflict = conflict.assign(audio_only=conflict["clip"].map(alone))
    columns = ["clip", "target", "voice", "named", "audio_only", "conflict"]
    return conflict[columns].reset_index(drop=True)


def accuracy(items: pd.DataFrame) -> pd.DataFrame:
    """What the answer follows under every condition: the voice, the matched T, or neither."""
    rows = []
    final = items.drop_duplicates(["unit", "target"])
    for condition, part in final.groupby("condition", sort=False):
        voice, target = part.prediction == part.voice, part.prediction == part.target
        answers = {"the voice (A)": voice, "the other label (T)": target & ~voice}
        for answer, hits in (answers | {"neither": ~(voice | target)}).items():
            rows.append({"condition": condition, "answer": answer} | rate(hits))
    return pd.DataFrame(rows)


def flip_summary(table: pd.DataFrame) -> pd.DataFrame:
    """How often the final prediction follows text or voice, and how often the text flipped it.

    A row of ``table`` is a conflict item: its labels ``voice`` (A) and ``named`` (T), and what is
    predicted under the prompts ``audio_only`` and ``conflict``. ``flip`` is that these differ.
    Among ``audio_only_correct``, the primary set, are the items whose voice the model recognises
    when nothing contradicts it.
    """
    correct = table.audio_only == table.voice
    events = {
        "text_follow": table.conflict == table.named,
        "audio_follow": table.conflict == table.voice,
        "other": (table.conflict != table.named) & (table.conflict != table.voice),
        "flip": table.conflict != table.audio_only,
    }
    rows = [{"measure": "audio_only_correct", "among": "all", **rate(correct)}]
    for measure, event in events.items():
        rows.append({"measure": measure, "among": "all", **rate(event)})
        rows.append({"measure": measure, "among": "audio_only_correct", **rate(event[correct])})
    return pd.DataFrame(rows)


def flip_cells(table: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
    """Flip rate by voice and named label, a row per cell; NaN where no item asked for it."""
    flips = table.assign(flip=table.conflict != table.audio_only).groupby(["voice", "named"]).flip
    every = pd.MultiIndex.from_product([labels, labels], names=["voice", "named"])
    cells = flips.agg(rate="mean", n="size").reindex(every)
    return cells.fillna({"n": 0}).astype({"n": int}).reset_index()


# --- Attention


def attention_ratios(attention: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """The modality attention ratio of every run and layer (M-000-13); NaN for a zero denominator.

    ``fraction``: a/(a+t). ``ratio``: a/t. ``density``: (a/n_audio)/(t/n_text), which does not grow
    with the length of the clip.
    """
    audio, text = (attention[attention.span == span] for span in ("audio", "text"))
    both = audio.merge(text, on=["unit", "layer"], suffixes=("_audio", "_text"))
    both = both.merge(runs[["unit", "clip", "condition", "target"]], on="unit")
    a, t, n_audio, n_text = both.mass_audio, both.mass_text, both.n_tokens_audio, both.n_tokens_text
    forms = {
        "fraction": a / (a + t).where(a + t > 0),
        "ratio": a / t.where(t > 0),
        "density": (a / n_audio) / (t / n_text).where(t > 0),
    }
    columns = ["unit", "clip", "condition", "target", "layer"]
    return both[columns].assign(**forms, n_audio=n_audio, n_text=n_text)
