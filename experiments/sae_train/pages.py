"""The page of a ``sae_train`` run: what the dictionaries are worth, and how they were trained."""

import pandas as pd

from hooked_alm.methods.dictionary.recipes import RECIPES

from ..materials.clips import file_safe
from ..materials.dictionary_partners import SOURCES, draw_partners
from ..workbench import figures
from ..workbench.page import Page
from .tables import TrainedResults

CAVEATS = (
    "A dictionary explains rows, not the model: that a row is made of some directions says nothing "
    "about whether the model uses them. What is used, only edits show.",
    "Stability is of directions, between trainings that saw the same rows in the same order and "
    "differ in their first directions alone. A share stands beside its nulls, never by itself.",
    "Dead latents are of neither dictionary when directions are compared, and are counted apart: a "
    "dictionary of few living latents that are all found again is stable, and small.",
)


NO_ANSWER = (
    "What the answer loses with reconstructions in the rows' place is not measured: a store has "
    "rows, and no run to put others into. `sae_train` on the model and its clips measures it."
)
OF_MEANS = (
    "What the answer loses with reconstructions in the rows' place is not measured: the mean over "
    "a clip is at no place of a run."
)


def lead(run: TrainedResults) -> str:
    """What was trained on what."""
    config, rows = run.config, run.inputs["rows"]
    sizes = ", ".join(
        f"{point} ({one['d_sae']} latents of {one['d_in']} numbers)"
        for point, one in run.inputs["points"].items()
    )
    noise = " Beside them stand as many of noise with the same mean and covariance."
    n_times = config.n_steps * config.step_rows / rows["learnt"]
    groups = f"{len(run.inputs['held_out_groups'])} other groups"
    return (
        f"{config.n_dictionaries} {config.architecture} dictionaries each of {sizes} were trained "
        f"on {rows['learnt']:,} rows, seen {n_times:.1f} times, and judged on "
        f"{rows['held out']:,} rows of {groups}.{noise if config.noise else ''}\n\nThey are in the "
        "run's folder, under sae/."
    )


def fill_page(page: Page, run: TrainedResults) -> None:
    """Every point, then the training."""
    page.section("On held-out rows")
    page.table("Reconstruction: in use (threshold) and as in training (batch)", run["quality"])
    if run["recovery"].empty:
        page.note(OF_MEANS if run.config.pool == "mean" else NO_ANSWER)
    else:
        page.table("What the answer loses at one position, the readout, under one instruction, in "
                   "nats, with other rows in the place of its own", run["recovered"])  # fmt: skip
    if not run["words"].empty:
        page.table("Cross-entropy of the words that are said, in nats a token", "words_recovered")
    page.section("The same directions again")
    if not (partners := run["partners"]).empty:
        matched = partners[partners["how"] == "matched"]
        for point, mine in matched.groupby("point", sort=False):
            draw_partners(page, mine, f"partners_{file_safe(str(point))}", str(point))
        page.table("Shares of latents with a partner, beside both nulls", run["stability"])
    page.section("Training")
    for point in run.inputs["points"]:
        _training(page, run["training"], point)
    page.table("The last step", run["training_end"])


def _training(page: Page, training: pd.DataFrame, point: str) -> None:
    mine = training[training["point"] == point]
    named = [f"{SOURCES[source]}, seed {seed}"
             for source, seed in zip(mine["source"], mine["seed"], strict=True)]  # fmt: skip
    shown = mine[["rows", "fvu", "dead"]].assign(of=named)
    drawing = figures.curves(
        shown, "rows", "fvu", group="of", title=point, x_label="rows seen",
        y_label="fraction of variance unexplained",
    )  # fmt: skip
    page.figure(
        f"training_{file_safe(point)}", drawing, shown, f"Training: {point}",
        "Of the batch's rows, before each step. Rows that are seen again are learnt by heart, too: "
        "compare with the held-out rows above.",
    )  # fmt: skip


def method(run: TrainedResults) -> str:
    """How dictionaries were trained and judged."""
    config, training = run.config, run.config.training()
    peaks = {training.rate(training.n_steps // 2, one["d_sae"]) for one in
             run.inputs["points"].values()}  # fmt: skip
    said = ", ".join(f"{name} ({source})" for name, source in config.provenance.items())
    recipe = f" Settings after {RECIPES[config.recipe].source}: {said}." if config.recipe else ""
    kept = f"k = {', '.join(str(one['k']) for one in run.inputs['points'].values())}"
    if config.architecture == "standard":
        kept = f"L1 penalty {training.l1_weight:g} a unit of activation"
    begun = "Directions begin at random, " + (
        "and are the encoder, too" if config.is_tied else "the encoder tied to them"
    )
    begun += ", and keep norm 1; " if config.keeps_norms else "; their norms are free; "
    begun += "b_dec begins at the geometric median" if config.is_centred else "there is no b_dec"
    of = "Means over each clip of rows" if config.pool == "mean" else "Rows"
    name = run.inputs["model"].get("name", "a model that its store does not name")
    where = f"as stored in {config.store}" if config.store else config.dtype
    return (
        f"Model: {name}, {where}. {of} of the spans {', '.join(config.spans)}, "
        f"padding left out, divided by their root mean square norm, which is folded back. "
        f"{training.n_steps} steps of {training.batch_size} rows; Adam, highest rate "
        f"{', '.join(f'{peak:.2g}' for peak in sorted(peaks))}; {kept}. Loss: fraction of "
        f"variance unexplained + {training.aux_weight:g} × that of the residual by dead latents, "
        f"those without activity for {training.n_dead:,} rows. {begun}. Rows are "
        f"shuffled with seed {config.seed}, the same for all dictionaries. Intervals resample "
        f"held-out groups, or latents, {config.n_resamples} times.{recipe}"
    )
