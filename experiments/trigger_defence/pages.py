"""The page of a ``trigger_defence`` run: figures, and how to read them."""

from collections.abc import Sequence

import pandas as pd

from ..materials.attack_results import add_attacks, how_attacked, reached
from ..materials.clips import of_whom
from ..materials.conflict_pages import add_prompts
from ..materials.recordings import Recording
from ..workbench import figures
from ..workbench.page import Page
from ..workbench.results import having
from .claims import PLACE
from .tables import DefenceResults

CAVEATS = (
    "A clean donor is an oracle: it tells where an attack is carried, and whoever has the clean "
    "clip needs no defence.",
    "Neurons are selected on attacks of the same kind, on other speakers. A perturbation that is "
    "made against the defended model is another attack, which this run does not make.",
    "A defence that changes every answer restores some by chance: read what is restored beside the "
    "false alarms on clean clips, and beside random neurons.",
    "The spectral gate takes the clip for its own noise: of steady sounds that last for a third of "
    "it, little is left.",
)
HOW_TO_READ = (
    "A patch from the clean clip is an oracle, from the clip without noise what a defender can do; "
    "a bias and pruning need no donor. Intervals resample groups."
)


def lead(run: DefenceResults) -> str:
    """What was attacked, and held."""
    config, table, clips, found = run.config, run["attack"], run["manifest"], reached(run)
    sizes = ", ".join(f"{PLACE[place]}, {n_blocks} blocks of {width}"
                      for place, (n_blocks, width) in run.inputs["neurons"].items())  # fmt: skip
    one = run.inputs["dictionary"]
    also = "" if one is None else f" So are features of {one['name']} at {one['point']}."
    return (
        f"{len(clips)} clips, {of_whom(clips)}. {len(table)} whose {config.label_column} is not "
        f"{run.inputs['target']!r} were attacked towards that answer by {how_attacked(config)}; "
        f"{int(found.reached.sum())} of the {len(found)} that were answered otherwise gave it. On "
        f"{int((table.half == 'discovery').sum())} of them the most sensitive neurons were "
        f"selected ({sizes}), on the others, of other groups, they were held.{also}"
    )


def fill_page(page: Page, run: DefenceResults, recordings: Sequence[Recording]) -> None:
    """The attack, the neurons that it moves, and what defences restore and cost."""
    page.section("The attack")
    add_prompts(page, run)
    add_attacks(page, run, recordings)
    page.section("The neurons that it moves")
    _sensitive(page, run)
    page.section("Defended", "Clips whose attack reached the target, of the other groups.")
    if run["defended"].empty:
        page.note("No attack reached its target: there is nothing to restore.")
    else:
        _swept(page, run, "restored", "restored", "Answers that are the clean one again")
        _every(page, run)
        page.table("Restored answers, recovered margins, changed answers", "restored")
    page.section("What it costs", "The same on clean clips, which nobody attacked.")
    _swept(page, run, "kept_answers", "alarm", "Answers that change: false alarms")
    page.table("Right answers, how many fewer, and false alarms", "kept_answers")


def _sensitive(page: Page, run: DefenceResults) -> None:
    table, places = run["blocks"], run.config.places
    drawing = figures.panels(
        figures.bars, [(table[table.place == one], {"title": PLACE[one]}) for one in places],
        x="block", y="neurons", x_label="block", y_label="neurons",
    )  # fmt: skip
    page.figure(
        "blocks", drawing, table, f"Where the {run.config.percent:g} % most sensitive ones are",
        "Of all blocks together, those that an attack moves most.",
    )  # fmt: skip
    chosen = having(run["sensitivity"], chosen_by="sensitive")
    page.table("Most sensitive first", chosen.sort_values("rank", kind="stable"), 30)


def _named(table: pd.DataFrame) -> pd.DataFrame:
    """Rows with the way neurons are held in words."""
    return table.assign(held=table.kind + (", " + table.donor).where(table.donor != "none", ""))


def _swept(page: Page, run: DefenceResults, name: str, what: str, title: str) -> None:
    places = run.config.places
    ends = {f"{what}_{end}": end for end in ("mean", "low", "high")}
    table = _named(having(run[name], chosen_by="sensitive", place=[*places]))
    table = table[["place", "held", "percent", "n", *ends]].rename(columns=ends)
    drawing = figures.panels(
        figures.curves, [(table[table.place == one], {"title": PLACE[one]}) for one in places],
        x="percent", group="held", x_label="percent held", y_label="share of clips",
        y_limits=(-0.02, 1.02),
    )  # fmt: skip
    page.figure(name, drawing, table, f"{title}, by the percentage that is held", HOW_TO_READ)


def _every(page: Page, run: DefenceResults) -> None:
    rows = _named(having(run["restored"], percent=[0.0, run.config.percent]))
    rows = rows.assign(held=rows.place + " " + rows.held)
    drawing = figures.bars(
        rows, "held", "restored_mean", lo="restored_low", hi="restored_high", group="chosen_by",
        y_label="share of clips", y_limits=(0, 1.02),
    )  # fmt: skip
    page.figure(
        "defences", drawing, rows, f"Every defence at {run.config.percent:g} %",
        "sensitive: what the defence is about; random: as many other neurons; layer: as many "
        "others of the same blocks.",
        "Drawn neurons must restore less, else it is not the chosen ones that carry the attack.",
    )  # fmt: skip


def method(run: DefenceResults) -> str:
    """How clips were attacked and defended, and intervals made."""
    config = run.config
    rows = "every row" if config.span == "all" else "rows of the clip"
    last = "" if config.last is None else f", the last {config.last} of them"
    score = f"{config.score}{', in standard deviations' if config.normalised else ''}"
    when = "at every step, but for patches" if config.every_step else "in the prompt alone"
    return (
        f"Model: {config.model}, {config.dtype}. An answer is greedy text that begins with "
        f"a label's word. Neurons score {score} over {rows}, averaged over clips, and are held at "
        f"them{last}, {when}; bias {config.bias:g}, noise {config.noise:.3g}, {config.n_draws} "
        f"draws of other neurons. {config.batch_size} clips a batch. Intervals resample groups "
        f"{config.n_resamples} times with seed {config.seed}."
    )
