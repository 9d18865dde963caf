"""Parts of pages that experiments on conflicts share."""

from collections.abc import Callable, Sequence
from typing import Any

from ..workbench.page import MAX_CLIPS, Page
from ..workbench.results import Results
from .clips import of_whom
from .confounds import add_confounds
from .recordings import Recording


def add_prompts(page: Page, run: Results[Any]) -> None:
    """Shows the first prompt of every language and condition."""
    page.table(
        "The first prompt of every language",
        [
            {"language": language, "condition": condition, "instruction": words}
            for language, prompts in run.inputs["prompts"].items()
            for condition, words in prompts.items()
        ],
    )


def add_clips(
    page: Page,
    run: Results[Any],
    recordings: Sequence[Recording],
    what: str,
    about: Callable[[Recording], dict[str, Any]],
    *,
    most: int = MAX_CLIPS,
) -> None:
    """Shows some clips of every label to play, and what else than its label tells them apart.

    Args:
        page: that is added to.
        run: of the clips.
        recordings: its clips.
        what: is shown beside them, in words.
        about: clip -> that.
        most: clips to show.
    """
    shown = page.sample(recordings, lambda one: one.label, seed=run.config.seed, most=most)
    page.play(shown, f"{shown.which} (mono, 16 kHz){what}", about)
    add_confounds(page, run["confounds"], run.config)


def the_clips(run: Results[Any]) -> str:
    """How many clips there are, of whom, and what their voices carry: two sentences."""
    clips, what = run["manifest"], run.config.label_column
    return (
        f"{len(clips)} clips, {of_whom(clips)}. What each voice carries (A) is in the column "
        f"{what}: {', '.join(clips[what].unique())}."
    )


def known_rule(run: Results[Any], what: str) -> str:
    """Under bundled models a paragraph on their rule, with what it means for the run; else none."""
    if not run.config.is_calibration:
        return ""
    return (
        "\n\nThe two bundled models were trained on a known rule: follows_voice lets the voice "
        f"win, its twin follows_text the instruction. {what}"
    )
