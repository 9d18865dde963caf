"""The page of a ``sae_steering`` run: sections, figures, and how to read them."""

import pandas as pd

from ..materials.transcription import Transcription
from ..workbench import figures
from ..workbench.page import Page
from ..workbench.report import Clip
from .claims import SAID
from .tables import SteeringResults

CAVEATS = (
    "What is taken out is chosen as more active where nothing is said; other sounds than those of "
    "the table may need other features.",
    "A model that writes nothing any more is silent of noise, too: read how often words are "
    "written of nothing beside the errors in speech, at every strength.",
    "Features beside the chosen ones are matched in what they are, shifts in how far they move "
    "rows: the table says how far each does.",
    "Rows that hear the clip are changed. What the encoder has written into frames that pad it "
    "stays, and the decoder may read it there.",
)


def lead(run: SteeringResults) -> str:
    """What was taken out of what."""
    one, config, chosen = run.inputs["dictionary"], run.config, run["chosen"]
    silent = chosen.holds == "no_speech"
    lost = [f"{chosen.unexplained[where].median():.2f}" for where in (silent, ~silent)]
    return (
        f"{config.dictionary} is a {one['architecture']} dictionary of {one['d_sae']} features of "
        f"{one['point']}; it leaves {lost[0]} of the variance within a clip without speech "
        f"unexplained, and {lost[1]} of speech (medians). On {int(silent.sum())} clips without "
        f"speech and {int((~silent).sum())} with it {config.n_latents} features were chosen, those "
        "that are most above in the former; they were taken out of "
        f"{len(run['transcripts'])} other clips while the model heard them, which it then wrote "
        "down."
    )


def fill_page(page: Page, run: SteeringResults, ours: Transcription) -> None:
    """What is written of nothing, what steering does to it, and which features it takes."""
    page.section("With features taken out")
    _doses(page, run)
    page.table("Every arm at every strength, with intervals", "steering")
    page.section("What is written")
    page.table("Texts written of clips without speech, the commonest first", "phrases")
    _examples(page, run, ours)
    page.section("The features")
    page.table("What was taken out, and its means where it was chosen", "latents")


def _doses(page: Page, run: SteeringResults) -> None:
    table, start = run["steering"], run["steering"].iloc[0]
    swept = [arm for arm in SAID if arm != "reconstruction"]
    parts = []
    for name, title in (("fpr", "words out of nothing"), ("wer", "errors in speech")):
        ends = {f"{name}_{end}": end for end in ("mean", "low", "high")}
        rows = pd.concat([
            pd.concat([start.to_frame().T, table[table.arm == arm]])
            .assign(taken_out=SAID[arm])[["taken_out", "alpha", *ends]]
            .rename(columns=ends)
            for arm in swept
        ])  # fmt: skip
        parts.append((rows.astype({end: float for end in ("alpha", *ends.values())}), title, name))
    labels = {"fpr": "share of clips without speech", "wer": f"errors for a {run.config.unit}"}
    drawing = figures.panels(
        figures.curves,
        [(rows, {"title": title, "y_label": labels[name]}) for rows, title, name in parts],
        x="alpha", group="taken_out", x_label="strength", reference=0,
    )  # fmt: skip
    page.figure(
        "doses", drawing, pd.concat([rows.assign(of=name) for rows, _, name in parts]),
        "How often words are written of nothing, and how many words of speech are wrong",
        "Strength 0 is the model as it is, 1 takes out what is named, more pushes against it. "
        "Steering works where the first curve of the features falls, those of the controls do "
        "not, and the second stays. Random draws are averaged.",
        "Strength 0 changes nothing, shifts are as large as what the features do.",
    )  # fmt: skip


def _examples(page: Page, run: SteeringResults, ours: Transcription) -> None:
    own = run["transcripts"].set_index("clip")
    table = run["steered"]
    mine = table[(table.arm == "features") & (table.alpha == run.config.alpha)].set_index("clip")
    changed = mine.index[mine.text != own.text.reindex(mine.index)]
    some = [one for one in ours.clips if one.name in {*changed}]
    if not some:
        page.note("No transcript changes when the features are taken out.")
        return
    shown = page.sample(some, lambda one: own.holds[one.name], seed=run.config.seed, most=6)
    found = [
        Clip(page.folder.add_clip(one.name, one.path), one.name, None,
             {"said": ours.said_in(one) or "nothing", "as it is": own.text[one.name] or "nothing",
              "features taken out": mine.text[one.name] or "nothing"})
        for one in shown.clips
    ]  # fmt: skip
    page.clips(found, f"{len(found)} of the {shown.n_of} clips that change. {shown.how}".rstrip())


def method(run: SteeringResults) -> str:
    """How features were chosen, and transcripts and intervals made."""
    config = run.config
    return (
        f"Model: {config.model}, {config.dtype}. A row x of the encoder that hears the clip "
        "becomes x - α Σ f_i W_dec[i] over the features taken out, what the dictionary does not "
        "reconstruct kept. They are chosen by their mean over all rows of clips without speech "
        f"less that of speech, on {config.choice_share:.0%} of the clips of either kind, drawn "
        f"with seed {config.seed}; {config.n_random} draws of others are each one's nearest in "
        "mean activation where nothing is said; the most frequent are so over all these rows; "
        "shifts move each row as far as the features do, against what all drawn others write there "
        f"on average, or from the mean of non-speech towards that of speech. Greedy "
        f"transcripts of at most {config.max_new_tokens} tokens, "
        f"{config.batch_size} clips a batch. Words are compared after normalisation: "
        f"{config.normaliser}. "
        f"Intervals resample {config.resampled} {config.n_resamples} times with seed "
        f"{config.seed}."
    )
