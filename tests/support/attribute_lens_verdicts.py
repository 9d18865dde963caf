"""What ``attribute_lens`` controls and claims, on tables made by hand, either way."""

from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd

from hooked_alm.experiments.attribute_lens.experiment import AttributeLens
from hooked_alm.experiments.attribute_lens.settings import AttributeLensConfig
from hooked_alm.experiments.attribute_lens.tables import AttributeResults, summarise
from hooked_alm.experiments.materials.confounds import Confound

Change = Callable[[AttributeResults], AttributeResults]
LABELS = ("dog", "cat", "cow")
N_CLIPS, N_WRONG = 33, 12
CURVES = {"right": (0.0, 0.0, 1.0), "wrong": (0.0, 1.0, 0.0)}
"""Hits at depths 0 to 2: the wrong answers had been read at depth 1."""
ROADS = {
    ("readout", "audio"): -4.0, ("readout", "mention"): -0.5, ("readout", "random"): -0.2,
    ("mention", "audio"): 0.0, ("mention", "random"): 0.0,
}  # fmt: skip


def clips() -> Iterator[tuple[dict[str, Any], str, float]]:
    """Who a clip is, whether it is answered right, and a number of its own around 1."""
    for i in range(N_CLIPS):
        who = {"clip": f"c{i}", "speaker": f"s{i % 4}", "attribute": "animal"}
        who |= {"prompt": "question", "label": LABELS[i % 3]}
        yield who, "wrong" if i < N_WRONG else "right", 1 + 0.01 * (i % 7)


def made(curves: dict[str, tuple[float, ...]], roads: dict[tuple[str, str], float]) -> Any:
    """Results over two blocks."""
    tables: dict[str, list[dict[str, Any]]] = {}

    def add(table: str, **row: Any) -> None:
        tables.setdefault(table, []).append(row)

    for who, outcome, around in clips():
        hits = curves[outcome]
        wrong = next(one for one in LABELS if one != who["label"])
        said = {hit: who["label"] if hit else wrong for hit in (0.0, 1.0)}
        for prompt in ("question", "options"):
            hit = hits[-1]
            row = {"prediction": said[hit], "hit": hit, "margin": (4 * hit - 2) * around}
            seen = {"label_mass": 0.9, "best_label_rank": 1, "top_token": said[hit]}
            add("answers", **{**who, "prompt": prompt}, **row, **seen)
            for position in ("readout", "mention"):
                for depth, hit in enumerate(hits):
                    read = {"prediction": said[hit], "hit": hit, "p_correct_soft": hit, "kl": 0.1}
                    at = {"position": position, "lens": "logit", "depth": depth, "agrees": 1.0}
                    add("information", **{**who, "prompt": prompt}, **at, **read, label_mass=0.9)
        before = {"base": 2 * around, "base_hit": hits[-1], "noise": 0.0}
        silent = {"prediction": wrong, "hit": 0.0, "margin": -3 * around}
        add("absences", **who, heard="silence", **silent)
        for (query, keys), gain in roads.items():
            for first, last in ((0, 0), (1, 1), (0, 1)):
                is_last = query == "mention" and first == 1
                row = {"query": query, "keys": keys, "first": first, "last": last}
                cell = {"prediction": wrong, "hit": 0.0, "margin": 0.0, **before}
                add("knockout", **who, **row, **cell, gain=0.0 if is_last else gain * around)
        for donor, gain in {"self": 0.5, "noise": 0.1}.items():
            row = {"mode": "add", "source": 1, "layer": 1, "donor": donor}
            cell = {"prediction": who["label"], "hit": 1.0, "margin": 3.0, **before}
            add("enrichment", **who, **row, **cell, gain=gain * around)
        row = {"mode": "add", "source": 1, "layer": 1, "gain": 0.5, **before}
        add("enrichment_search", **who, **row, prediction=who["label"], hit=1.0, margin=3.0)
    inputs = {
        "model": {"blocks": 2}, "labels": {"animal": [*LABELS]},
        "audio_is_behind": {"animal": True}, "validation": [],
    }  # fmt: skip
    frames = {name: pd.DataFrame(rows) for name, rows in tables.items()}
    config = AttributeLensConfig(n_resamples=1000, audio="my.csv")
    run = AttributeLens.results(config, inputs, frames)
    run.tables["confounds"] = pd.DataFrame(columns=["attribute", *Confound._fields])
    return concluded(run)


def concluded(run: AttributeResults) -> AttributeResults:
    """The results with their summaries made anew."""
    for name, table in summarise(run):
        run.tables[name] = table
    return run


def cases() -> AttributeResults:
    """The answer is read late, from the audio itself, and early states help."""
    return made(CURVES, ROADS)


def _changed(table: str, column: str, change: Callable[[pd.DataFrame], Any]) -> Change:
    def apply(run: AttributeResults) -> AttributeResults:
        run.tables[table] = run[table].assign(**{column: change(run[table])})
        return concluded(run)

    return apply


def _deaf(run: AttributeResults) -> AttributeResults:
    return made({"right": (0.0, 0.0, 0.0), "wrong": (0.0, 0.0, 0.0)}, ROADS)


BROKEN: dict[str, Change] = {
    "a label is the top token": _changed("answers", "best_label_rank", lambda t: 2),
    "probability of the labels together": _changed("answers", "label_mass", lambda t: 0.2),
    "the lens ends in the output": _changed(
        "information", "label_mass", lambda t: t.label_mass.where(t.depth < 2, 0.5)
    ),
    "no labels hold more than all probability": _changed(
        "information", "label_mass", lambda t: t.label_mass.where(t.depth > 0, 1.1)
    ),
    "a mention before the audio is blind to it": _changed(
        "knockout", "gain",
        lambda t: t.gain.where((t["query"] == "readout") | (t["first"] > 0), -0.1),
    ),
    "the mention's last block is not read": _changed(
        "knockout", "gain",
        lambda t: t.gain.where((t["query"] == "readout") | (t["first"] < 1), -0.1),
    ),
}  # fmt: skip
OTHER_WAY: dict[str, Change] = {
    "answers_animal": _deaf,
    "uses_the_audio_animal": _changed("absences", "margin", lambda t: 9.0),
    "readable_animal": _deaf,
    "direct_animal": lambda run: made(CURVES, ROADS | {("readout", "mention"): -4.0}),
    "peaks_and_drops_animal": lambda run: made(CURVES | {"wrong": (0.0, 0.0, 0.0)}, ROADS),
    "enrichment_animal": _changed(
        "enrichment", "gain", lambda t: t.gain.where(t.donor == "self", 0.6)
    ),
}
