"""The instruction of every condition, in any language: it asks for the voice's label, or names one.

Source: seed 000; the controls ``mention_only``, ``list_all`` and ``irrelevant_adjective`` answer C9
(the instruction leaks the label).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from hooked_alm.errors import InputError

from .records import Words

PromptMode = Literal[
    "audio_only", "conflict", "consistent", "mention_only", "list_all", "irrelevant_adjective"
]
# Each prompt is a list of (segment, text): the label word is a segment of its own, so that it can
# be patched apart from the rest of the instruction.
PromptSegments = list[tuple[str, str]]


def _has(field: str) -> AfterValidator:
    def check(text: str) -> str:
        if text.count(field) != 1:
            raise ValueError(f"text that has {field} once")
        return text

    return AfterValidator(check)


WithLabel = Annotated[Words, _has("{label}")]
WithLabels = Annotated[Words, _has("{labels}")]


class Instructions(BaseModel):
    """The instructions in one language; ``{label}`` stands where a label's word comes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ask: Words = Field(description="begins every prompt: what is asked about the voice")
    label_only: Words = Field(description="ends the prompt of audio_only, which names no label")
    obey: WithLabel = Field(description="asks to judge as {label}: conflict, and consistent")
    mention: WithLabel = Field(description="mentions {label} without asking for it: mention_only")
    choose: WithLabels = Field(description="lists all {labels}: list_all")
    quoted: WithLabel = Field(default='"{label}"', description="one label in that list")
    between: str = Field(default=" ", description="what stands between two labels in that list")
    unrelated: Words = Field(description="a word that is no label: irrelevant_adjective")

    def segments(
        self,
        mode: PromptMode,
        words: Mapping[str, str],
        *,
        voice: str,
        named: str | None = None,
        order: Sequence[str] = (),
    ) -> PromptSegments:
        """The instruction of one run, cut into ``text`` and ``label`` segments.

        Args:
            mode: the condition. ``conflict`` and ``consistent`` share one template.
            words: label -> how the prompt spells it.
            voice: label of the clip; only checked against ``named``.
            named: label named by the instruction (``conflict``, ``consistent``, ``mention_only``).
            order: order of the labels under ``list_all``, so that a run can counterbalance it;
                that of ``words`` if not given.

        Raises:
            InputError: ``named`` is missing, superfluous, equal to ``voice`` under ``conflict`` or
                different from it under ``consistent``.
        """
        _check_named(mode, voice, named)
        if mode == "audio_only":
            return [("text", self.ask + self.label_only)]
        if mode == "list_all":
            every = (self.quoted.replace("{label}", words[one]) for one in order or words)
            return [("text", self.ask + self.choose.replace("{labels}", self.between.join(every)))]
        if mode == "irrelevant_adjective":
            return [("text", self.ask + self.obey.replace("{label}", self.unrelated))]
        assert named is not None
        template = self.mention if mode == "mention_only" else self.obey
        before, after = template.split("{label}")
        parts = [("text", self.ask + before), ("label", words[named]), ("text", after)]
        return [part for part in parts if part[1]]


def _check_named(mode: PromptMode, voice: str, named: str | None) -> None:
    names_one = mode in ("conflict", "consistent", "mention_only")
    if names_one != (named is not None):
        raise InputError(
            f"prompt mode {mode!r}: got named={named!r}, expected "
            f"{'a label' if names_one else 'none'}."
        )
    if mode == "conflict" and named == voice:
        raise InputError(
            f"prompt mode 'conflict': the instruction names {named!r}, which is the voice's own "
            "label. Use mode 'consistent', or name another label."
        )
    if mode == "consistent" and named != voice:
        raise InputError(
            f"prompt mode 'consistent': the instruction names {named!r} but the voice is "
            f"{voice!r}. Use mode 'conflict', or name the voice's label."
        )
