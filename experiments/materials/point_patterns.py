"""Patterns of hook points as a setting: refused as soon as they are read, if they are none."""

from typing import Annotated

from pydantic import AfterValidator, Field

from hooked_alm.errors import HookNameError
from hooked_alm.methods.activations.selection import select_names


def _are_patterns(points: list[str]) -> list[str]:
    for pattern in points:
        try:
            select_names(pattern, [pattern])
        except HookNameError as error:
            if "matches none" not in str(error):
                raise ValueError(str(error)) from None
    return points


PointPatterns = Annotated[list[str], Field(min_length=1), AfterValidator(_are_patterns)]
"""Hook points; which of them the model has, only the model knows."""
