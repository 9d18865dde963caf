"""The page of a ``convergence`` run: sections, figures, and how to read them."""

import pandas as pd

from ..workbench import figures
from ..workbench.page import Page
from .tables import AgreementResults, n_depths, of_rows, similarity

DEPTH = "depth of the encoder (blocks passed)"
BAND = "Bands are 95 % bootstrap intervals, each depth by itself."
NAMES = {
    "stabilisation": "transcript near the final one", "critical": "log-probability turns",
    "saturation": "decoder settles its tokens", "cka": "similarity to the last state",
    "centred_norm": "centred norm", "raw_norm": "raw norm",
}  # fmt: skip
ROWS = {
    "own": "of the clip", "all": "padding, too", "without_massive": "of the clip, none massive"
}  # fmt: skip
CAVEATS = (
    "Three depths of an encoder of few blocks agree often by chance: see the agreement of depths "
    "drawn anew beside the observed one, and prefer models of twelve blocks or more.",
    "Agreement is no mechanism: measures may turn at one depth for different reasons. What a block "
    "does, patching it shows.",
    "Frames of a clip are not independent: similarity over the rows of one clip is that of its "
    "frames, and says nothing of other clips.",
    "A raw norm can be moved to any block without changing what the model computes (C41). It is "
    "shown, and nothing rests on it unless it is asked for.",
)


def lead(run: AgreementResults) -> str:
    """What is compared."""
    asked = ", ".join(NAMES[measure] for measure in run.config.measures)
    n = run["depths"]["clip"].nunique()
    return (
        f"In each of {n} clips, every measure has one depth of the encoder at which it turns: "
        f"{asked}. If they are about one event, these depths go together, clip by clip. This page "
        "compares them with depths that are drawn at random, and with those of other clips."
    )


def fill_page(page: Page, run: AgreementResults) -> None:
    """Curves, the depths at which they turn, and how often these agree."""
    page.section("What turns")
    _curves(page, run)
    page.section("Where it turns")
    _depths(page, run)
    page.table("Mean depth, and the one that most clips have", "turning_points")
    page.section("Whether it is the same depth")
    page.table(
        "Clips in which the measures lie together, by tolerance, beside depths drawn at random "
        "(chance) and those of other clips (permuted)",
        "agreement",
    )


def _curves(page: Page, run: AgreementResults) -> None:
    every = run["curves"]
    page.figure(
        "transcripts",
        figures.panels(
            figures.curves,
            [
                (every[every.of == "distance"],
                 {"title": "Distance from the final transcript", "y_label": "share of characters",
                  "reference": run.config.near}),
                (every[every.of == "log_p"],
                 {"title": "The final transcript", "y_label": "nats per token"}),
            ],
            height=3.4, x="depth", x_label=DEPTH,
        ),
        every[every.of.isin(["distance", "log_p"])],
        "The transcript of every depth, and how likely the final one is there",
        f"The line is what still counts as the final transcript. {BAND}",
    )  # fmt: skip
    streams = every[every.rows != ""].assign(over=every.rows.map(ROWS))
    kinds = {
        similarity(run): ("Similarity to the last state", "CKA"),
        "centred_norm": ("Norm, each row's mean taken out", "Frobenius norm"),
        "raw_norm": ("Raw norm", "Frobenius norm"),
    }
    page.figure(
        "streams",
        figures.panels(
            figures.curves,
            [
                (streams[streams.of == kind], {"title": title, "y_label": label})
                for kind, (title, label) in kinds.items()
            ],
            height=3.4, x="depth", group="over", x_label=DEPTH,
        ),
        streams[streams.of.isin([*kinds])],
        "The encoder's own stream, by which rows are counted",
        "Padding follows the clip; massive rows are some of many times the median's norm. Where "
        f"curves of different rows differ, few rows make the difference. {BAND}",
    )  # fmt: skip


def _depths(page: Page, run: AgreementResults) -> None:
    table, last = run["depths"], n_depths(run)
    shares = [
        {"depth": depth, "measure": NAMES[measure],
         "share": float((some.depth.round() == depth).mean())}
        for measure in NAMES
        for some in [table[(table.measure == measure) & (table.rows == of_rows(run, measure))]]
        for depth in range(last + 1)
    ]  # fmt: skip
    numbers = pd.DataFrame(shares)
    drawing = figures.heat_map(
        numbers, "depth", "measure", "share", title="Where each measure turns", x_label=DEPTH,
        y_label="", value_label="share of clips", limits=(0, 1),
    )  # fmt: skip
    page.figure(
        "turning_points", drawing, numbers,
        "Share of the clips in which a measure turns at a depth",
        "A column that is bright in every row is a depth at which they agree. A step across block "
        "b, counted from 0, is depth b + 1. The decoder's depth is drawn as if it had as many "
        "blocks as the encoder.",
    )  # fmt: skip


def method(run: AgreementResults) -> str:
    """How depths and chance were found."""
    config = run.config
    return (
        f"Model: {config.model}, {config.dtype}; encoder of {n_depths(run)} blocks, decoder of "
        f"{run.n_blocks}. Streams over rows: {config.rows}; CKA "
        f"{'debiased' if config.debiased else 'plain'}; a row is massive from {config.massive:g} "
        f"times the median's norm at any depth. Log-probability turns by {config.critical_method}. "
        f"Intervals resample {config.resampled} "
        f"{config.n_resamples} times with seed {config.seed}."
    )
