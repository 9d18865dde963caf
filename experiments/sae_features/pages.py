"""The page of a ``sae_features`` run: domains, and features with the clips that they fire in."""

from collections.abc import Sequence

import pandas as pd

from ..materials.clips import ClipFile, file_safe
from ..workbench import figures
from ..workbench.page import Page
from ..workbench.report import Clip
from .tables import FeatureResults

CAVEATS = (
    "A feature is named by whoever listens to its strongest clips. What it fires on besides is in "
    "the weaker ones, which are not played.",
    "That a feature fires in clips of one domain alone says nothing of what the model does with "
    "it; whatever else goes with the domain in these clips, such as a speaker or a sentence, is as "
    "good a name.",
    "Domains are dealt out to clips one by one: where clips of a speaker have one domain, chance "
    "is understated.",
)


def lead(run: FeatureResults) -> str:
    """What was read on what."""
    one, n = run.inputs["dictionary"], run["features"]
    clips = ", ".join(f"{count} {value}" for value, count in run.inputs["domains"].items())
    return (
        f"{run.config.dictionary} is a {one['architecture']} dictionary of {one['d_sae']} features "
        f"of {one['point']}. It is read on {run.inputs['rows']:,} rows of "
        f"{len(run.inputs['clips'])} clips ({clips}); {len(n)} features are active somewhere, "
        f"{run['clips']['l0'].mean():.1f} in a row on average."
    )


def fill_page(page: Page, run: FeatureResults, clips: Sequence[ClipFile]) -> None:
    """Domains, then the shown features with their clips."""
    page.section("Domains", f"Clips are told apart by their {run.config.domain}.")
    _domains(page, run)
    page.table("Features of each domain, beside what dealing domains out gives", "domains")
    by_name = {clip.name: clip for clip in clips}
    for feature, frames in run["frames"].groupby("feature", sort=False):
        _feature(page, run, int(feature), frames, by_name)
    page.section("All features")
    page.table("Features that are active anywhere", "features")


def _domains(page: Page, run: FeatureResults) -> None:
    shares = run["features"].dropna(subset=["domain_share"])
    shown = shares[["commonest", "domain_share", "n_clips", "feature"]]
    steps = [round(0.02 * step, 2) for step in range(51)]
    curves = pd.DataFrame([
        {"domain": value, "share": at, "features": int((some["domain_share"] >= at).sum())}
        for value, some in shown.groupby("commonest")
        for at in steps
    ])  # fmt: skip
    if curves.empty:
        return
    drawing = figures.curves(
        curves, "share", "features", group="domain", title="Features by their commonest domain",
        x_label="share of a feature's clips that are of it", y_label="features at it or above",
    )  # fmt: skip
    page.figure(
        "domains", drawing, curves, "How much of one domain features are",
        f"A feature counts as active in a clip if more than {run.config.active_share:.0%} of the "
        "clip's rows activate it. Features of few clips reach high shares by chance: see the "
        "table.",
    )  # fmt: skip


def _feature(
    page: Page, run: FeatureResults, feature: int, frames: pd.DataFrame, clips: dict[str, ClipFile]
) -> None:
    row = run["features"].set_index("feature").loc[feature]
    named = f": {row['domain']}" if row["domain"] else ""
    text = (
        f"Active in {row['n_clips']} clips, {row['domain_share']:.0%} of them {row['commonest']}; "
        f"at its highest {row['highest']:.3g}."
    )
    promoted = run["promoted"]
    mine = promoted[promoted["feature"] == feature] if len(promoted) else promoted
    if len(mine):
        pairs = zip(mine["token"], mine["logit"], strict=True)
        words = ", ".join(f"{token!r} ({logit:+.2f})" for token, logit in pairs)
        text += f" Its direction raises the tokens {words}."
    page.section(f"Feature {feature}{named}", text)
    top = float(frames["activation"].max())
    names = [clips[name] for name in frames["clip"].unique()]
    sample = page.sample(names, lambda one: one.name, seed=run.config.seed)
    listened = []
    for clip in sample.clips:
        some = frames[frames["clip"] == clip.name][["row", "seconds", "activation"]]
        by_time = bool(some["seconds"].notna().all())
        drawing = figures.curves(
            some, "seconds" if by_time else "row", "activation", title=clip.name,
            x_label="seconds" if by_time else "row", y_label="activation", y_limits=(0, 1.05 * top),
        )  # fmt: skip
        figure = f"feature_{feature}__{file_safe(clip.name)}"
        figures.save_figure(page.folder, figure, drawing, some)
        about = {run.config.domain: clip.cells[run.config.domain],
                 "highest": float(some["activation"].max())}  # fmt: skip
        listened.append(Clip(page.folder.add_clip(clip.name, clip.path), clip.name, figure, about))
    page.clips(listened, "The clips in which it reaches highest, and its activation by time")


def method(run: FeatureResults) -> str:
    """How features were read and domains judged."""
    config = run.config
    return (
        f"Model: {config.model}, {config.dtype}. Rows of the spans {', '.join(config.spans)}, "
        "padding left out; features are the dictionary's in use, by its thresholds where it has "
        f"some. A feature is of a domain if more than {config.active_share:.0%} of the rows of "
        f"{config.domain_clips} clips or more activate it, of which {config.domain_share:.0%} or "
        f"more are of the domain; domains were dealt out to the clips {config.n_draws} times with "
        f"seed {config.seed}. Tokens: the feature's direction, scaled by the final norm's weight, "
        "times the unembedding, less the mean over the vocabulary."
    )
