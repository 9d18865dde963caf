"""Parts of pages that experiments on conflicts share."""

from typing import Any

from ..workbench.page import Page
from ..workbench.results import Results


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
