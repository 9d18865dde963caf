"""Questions about two clips at once, of which every word behind them hears one, both or none.

Both clips stand at the same positions, as if each were the only one, and neither hears the other.
Of what a word says it is known in this way whether it got it from one word or another. With nothing
for the second clip, and all words hearing the first, it is the question as it is asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from bundled_data import Case
from bundled_model import chat_text
from bundled_training import DecoderInput
from torch import Tensor, nn
from transformers import Qwen2AudioProcessor

ROLES = ("rest", "mention", "readout")
"""Words behind the clips: the one that names what is asked, the last, and all others."""
NAMED = {"en": "emotion", "zh": "情绪"}
"""What names the emotion in every question."""


def hearing(rest: str, mention: str, readout: str) -> Tensor:
    """Which clips are heard ``[role, clip]``: each role says ``own``, ``other``, or nothing."""
    return torch.tensor([[one == "own", one == "other"] for one in (rest, mention, readout)])


@dataclass(frozen=True)
class Laid:
    """What the decoder is given, and the two tokens that it should say to each question."""

    embeds: Tensor  # [case, pos, d_model]
    seen: Tensor  # [case, 1, query, key]
    positions: Tensor  # [case, pos]
    targets: Tensor  # [case, 2]: label, end of turn


class CrossedClips:
    """Lays questions out behind two clips."""

    def __init__(self, processor: Qwen2AudioProcessor) -> None:
        self._processor, self._inputs = processor, DecoderInput(processor)
        self._words = cache(self._find_words)

    def _find_words(self, prompt: str, named: str) -> tuple[int, int]:
        """How many tokens stand behind the clip, and which of them names what is asked."""
        text = chat_text(self._processor, prompt)
        found = self._processor.tokenizer(text, return_offsets_mapping=True)
        behind = found.input_ids.index(self._processor.audio_token_id) + 1
        end = text.index(named, text.index(prompt)) + len(named)
        mention = next(i for i, (_, stop) in enumerate(found.offset_mapping) if stop >= end)
        return len(found.input_ids) - behind, mention - behind

    def build(
        self,
        embed: nn.Module,
        cases: Sequence[Case],
        own: Sequence[Tensor],
        other: Sequence[Tensor],
        hears: Tensor,
    ) -> Laid:
        """Questions with their answers, which are the voice's of their own clip.

        Args:
            embed: the decoder's embedding.
            cases: questions.
            own: audio tokens of the clip of each.
            other: those of the second clip; none of them is none.
            hears: which clips are heard by whom, ``[case, role, clip]``.
        """
        embeds, real, targets = self._inputs.build(
            embed,
            [(case.prompt, case.answer("voice")) for case in cases],
            [torch.cat(pair) for pair in zip(own, other, strict=True)],
        )
        shape, width = real.shape, real.shape[1]
        clip, role = torch.full(shape, -1), torch.full(shape, -1)
        positions = torch.arange(width).repeat(len(cases), 1)
        for row, (case, a, b) in enumerate(zip(cases, own, other, strict=True)):
            n_behind, mention = self._words(case.prompt, NAMED[case.language])
            words = width - 1 - n_behind  # the answer's label stands last
            second = words - len(b)
            clip[row, second - len(a) : second] = 0
            clip[row, second:words] = 1
            role[row, words:] = ROLES.index("rest")
            role[row, words + mention] = ROLES.index("mention")
            role[row, -2] = ROLES.index("readout")
            positions[row, second:words] -= len(a)
            positions[row, words:] -= len(b)
        query, key = (slice(None), slice(None), None), (slice(None), None)
        heard = hears[torch.arange(len(cases))[:, None, None], role[query], clip[key]]
        seen = torch.ones(width, width).tril().bool() & real[key].bool()
        seen = seen & (heard | (role[query] < 0) | (clip[key] < 0))
        seen = seen & ~((clip[query] == 1) & (clip[key] == 0))
        seen = seen | torch.eye(width).bool()  # a pad sees itself
        return Laid(embeds, seen[:, None], positions, targets)
