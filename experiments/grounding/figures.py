"""The figures of a ``grounding`` page, drawn from its summary tables."""

import pandas as pd

from ..materials.conflict_figures import draw_handoffs
from ..materials.conflict_runs import INPUTS
from ..materials.head_maps import draw_head_maps
from ..workbench import figures
from ..workbench.page import Page
from ..workbench.results import having
from .claims import WHAT
from .measure import MLP, READINGS, PatchReading
from .settings import ALL
from .tables import GroundingResults

DEPTH = "depth (blocks passed)"
HOW: dict[PatchReading, str] = {
    "denoise": "States of the exchanged run are written into the run as asked: what suffices.",
    "noise": "States of the run as asked are written into the exchanged one: what is needed.",
}
SHOWN = (ALL, "audio", "text", "readout")
POINTWISE = "Bands are 95 % bootstrap intervals over clips, each depth by itself."


def add_coefficient(page: Page, run: GroundingResults) -> None:
    """Adds the coefficient by depth and span, both readings apart."""
    config, means = run.config, having(run["grounding_means"], measure="gc", span=SHOWN)
    if means["mean"].isna().all():
        why = f"no span moves the answer of an item by {config.min_effect:g} logits"
        if config.condition == "audio_only":
            why = "there are not two inputs to share"
        page.note(f"The grounding coefficient is NaN everywhere: {why}.")
        return
    limits = (-0.03, 1.03) if config.gc_form == "share" else (0, None)
    drawing = figures.panels(
        figures.curves, [(having(means, direction=one), {"title": one}) for one in READINGS],
        height=3.4, x="depth", group="span", reference=config.even, x_label=DEPTH,
        y_label="grounding coefficient", y_limits=limits,
    )  # fmt: skip
    page.figure(
        "coefficient", drawing, means,
        "The audio's part in what one span carries, depth by depth",
        f"Above {config.even:g} what is exchanged there is the voice's, below it the "
        f"instruction's. {' '.join(f'{one}: {HOW[one]}' for one in READINGS)} A point is the mean "
        f"of the items whose answer that span moves by {config.min_effect:g} logits or more; "
        f"where there is none, there is no point. {POINTWISE}",
        "Where runs are equally long, the span all is the other run, at every depth alike.",
    )  # fmt: skip


def add_handoffs(page: Page, run: GroundingResults, reading: PatchReading) -> None:
    """Adds the recovery at each input's own span and at the readout, in one reading."""
    donors, ends = {f"rec_{name}": kind for name, kind in INPUTS.items()}, ("mean", "low", "high")
    means = having(run["grounding_means"], direction=reading, measure=[*donors])
    table = means.dropna(subset="mean").assign(donor=means.measure.map(donors))
    table = table.rename(columns={end: f"recovery_{end}" for end in ends})
    table = table.merge(run["handoffs"][["direction", "donor", "span"]])
    if table.empty:
        return
    drawing = draw_handoffs(table, "depth", "span", x_label=DEPTH, height=3.4)
    page.figure(
        f"handover__{reading}", drawing, table,
        f"Where each input is, depth by depth: {reading}",
        f"{HOW[reading]} 1 is the exchange's whole effect. An input leaves its own span where its "
        f"curve drops below one half for good, and is at the readout from where that curve stays "
        f"above. {POINTWISE}",
        "Both curves need not add up to 1: in between the information may sit elsewhere.",
    )  # fmt: skip


def _effects(run: GroundingResults) -> pd.DataFrame:
    """Mean effects of heads and MLPs at the readout, with what is ``exchanged``."""
    names = {f"effect_{name}": what for name, what in WHAT.items()}
    means = having(run["node_means"], span="readout", measure=[*names]).dropna(subset="mean")
    return means.assign(exchanged=means.measure.map(names))


def add_heads(page: Page, run: GroundingResults, reading: PatchReading) -> None:
    """Adds a map of the heads' effects at the readout, a panel for each input."""
    every = _effects(run).query(f"head != {MLP}")
    some = having(every, direction=reading)
    maps = {f"The {what} exchanged": part for what, part in some.groupby("exchanged", sort=False)}
    drawing = draw_head_maps(maps, every["mean"], run.n_blocks, y="block", value="mean")
    page.figure(
        f"heads__{reading}", drawing, some.drop(columns="exchanged"),
        f"What each head brings to the readout: {reading}",
        f"{HOW[reading]} Mean over items of how far the head moves the answer towards what the "
        "exchange does; red moves it there, blue away, on one scale in all maps of heads. Blocks "
        "from bottom to top.",
        "A head's effect contains everything downstream of it; effects do not add up.",
    )  # fmt: skip


def add_mlps(page: Page, run: GroundingResults) -> None:
    """Adds the effects of the MLPs at the readout, a panel for each reading."""
    some = having(_effects(run), head=MLP)
    drawing = figures.panels(
        figures.curves, [(having(some, direction=one), {"title": one}) for one in READINGS],
        height=3.0, x="block", group="exchanged", reference=0, y_label="effect (logits)",
    )  # fmt: skip
    page.figure(
        "mlps", drawing, some, "What each MLP brings to the readout",
        f"As the maps of heads, for each MLP's output. {POINTWISE.replace('depth', 'block')}",
    )  # fmt: skip
