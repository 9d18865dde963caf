"""What ``lora_blocks`` controls and claims, on tables made by hand: each comes out either way."""

from collections.abc import Callable
from typing import Any

import pandas as pd

from hooked_alm.experiments.lora_blocks.experiment import LoraBlocks
from hooked_alm.experiments.lora_blocks.measure import SHAPES, WHOLE
from hooked_alm.experiments.lora_blocks.settings import LoraBlocksConfig
from hooked_alm.experiments.lora_blocks.tables import LoraResults, summarise
from hooked_alm.experiments.workbench.controls import ROUNDING

N_BLOCKS = 6
INPUTS = {"model": {"blocks": N_BLOCKS}, "labels": ["sad", "glad"], "centred": False}
LEAST = 1.5 * ROUNDING["logit"]["float32"]
Change = Callable[[LoraResults], LoraResults]
FORMS = ("single", "progressive")
SHARES = (0.02, 0.05, 0.1, 0.15, 0.9, 0.2)
"""Of what the adapter does, by block: the later, and the larger, the more."""


def tables(n_clips: int = 12, shares: tuple[float, ...] = SHARES) -> dict[str, pd.DataFrame]:
    """An adapter that turns answers round, by one block above all."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in LoraBlocks.tables}
    for n in range(n_clips):
        who = {"item": f"c{n}__conflict", "clip": f"c{n}", "voice": "sad", "target": "glad",
               "condition": "conflict"}  # fmt: skip
        off, on = -5.0 - 0.1 * (n % 3), 4.0 + 0.1 * (n % 4)
        rows["items"].append({**who, "lead_off": off, "lead_on": on, "resumed": 0.0})
        for block, share in enumerate(shares):
            part = (share + 0.001 * (n % 5)) * (on - off)
            for reading, lead in (("denoise", off + part), ("noise", on - part)):
                rows["switched"].append({
                    **who, "block": block, "reading": reading, "lead": lead, "answer": "sad",
                })  # fmt: skip
        for form, blocks in (("whole", [WHOLE]), *((one, range(len(shares))) for one in FORMS)):
            for block in blocks:
                numbers = {"accuracy": 1.0, "confidence": 0.9, "loss": 0.1}
                rows["erased"].append({**who, "form": form, "block": block, **numbers})
        for way, lead in (("base", off), ("adapted", on)):
            rows["runs"].append({
                **who, "way": way, "prediction": "glad" if lead > 0 else "sad", "lead": lead,
                "z_sad": 0.0, "z_glad": lead, "label_mass": 0.9, "best_label_rank": 1,
            })  # fmt: skip
            for depth in range(N_BLOCKS + 1):
                rows["depths"].append({
                    **who, "way": way, "depth": depth, "lead": lead * depth / N_BLOCKS,
                    "kl": 1 - depth / N_BLOCKS, "same": depth > 3,
                })  # fmt: skip
            for block in range(N_BLOCKS):
                numbers = dict.fromkeys(SHAPES, 0.5)
                rows["contributions"].append({**who, "way": way, "block": block, **numbers})
        for depth in range(N_BLOCKS + 1):
            rows["drift"].append({**who, "depth": depth, "share": depth / 10})
    for block in range(len(shares)):
        rows["sizes"].append({
            "block": block, "module": "attn.q_proj", "rank": 4, "frobenius": 1.0 + block,
            "spectral": 0.5, "of_weight": 9.0,
        })  # fmt: skip
    for span in ("audio", "readout"):
        for depth in range(N_BLOCKS + 1):
            cka = {"cka": 1 - depth / 20, "dealt": 0.0, "n": n_clips}
            rows["similarity"].append({"span": span, "of": "states", "depth": depth, **cka})
    return {name: pd.DataFrame(found) for name, found in rows.items() if found}


def concluded(made: dict[str, pd.DataFrame]) -> LoraResults:
    run = LoraBlocks.results(LoraBlocksConfig(n_resamples=1000), INPUTS, made)
    for name, table in summarise(run):
        run.tables[name] = table
    return run


def cases() -> LoraResults:
    return concluded(tables())


MEASURED = {*LoraBlocks.tables} - {"sounds", "shapley", "spectra"}


def edit(table: str, query: str, column: str, by: Callable[[pd.Series], Any]) -> Change:
    """Changes some numbers of a run, and makes its summaries anew."""

    def change(run: LoraResults) -> LoraResults:
        found = run[table].copy()
        rows = found.query(query).index
        found.loc[rows, column] = by(found.loc[rows, column])
        return concluded({name: run[name] for name in MEASURED} | {table: found})

    return change


def other(shares: tuple[float, ...]) -> Change:
    """The same with other shares of the blocks."""
    return lambda run: concluded(tables(shares=shares))


BROKEN: dict[str, Change] = {
    "a label is the top token": edit("runs", "way != 'z'", "best_label_rank", lambda x: 3),
    "probability of the labels together": edit("runs", "way != 'z'", "label_mass", lambda x: 0.1),
    "the whole adapter, gone on with at the middle block": edit(
        "items", "clip == 'c1'", "resumed", lambda x: x + 1e-6
    ),
    "with and without the adapter, switched = run whole": edit(
        "items", "clip == 'c1'", "lead_off", lambda x: x + LEAST
    ),
    "the lens at the last depth = the model": edit(
        "depths", f"depth == {N_BLOCKS} and clip == 'c1'", "lead", lambda x: x + LEAST
    ),
    "without the first block is the same, erased alone or from it on": edit(
        "erased", "block == 0 and form == 'single' and clip == 'c1'", "loss", lambda x: x + 1e-6
    ),
    "before the first block nothing is turned": edit(
        "similarity", "depth == 0 and span == 'audio'", "cka", lambda x: 0.99
    ),
    "every block with an update is switched": edit(
        "sizes", "block == 1", "block", lambda x: N_BLOCKS + 1
    ),
}
OTHER_WAY: dict[str, Change] = {
    "carrier": other((0.02, 0.05, 0.1, 0.4, 0.41, 0.2)),
    "by_size": other((0.3, 0.1, 0.9, 0.05, 0.3, 0.1)),
    "late": other((0.3, 0.1, 0.9, 0.05, 0.3, 0.1)),
}  # fmt: skip
