"""Prompts: an ``ALMInput`` from waveforms and text, by the parts of a Hugging Face processor."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .audio import AudioSource, read_audio
from .chat_template import render_chat
from .errors import InputError, any_failure
from .frontend import FrontEnd
from .inputs import ALMInput, AudioClip, positions_from_mask
from .log_mel import samples_with_gradient, windows_with_gradient
from .spans import SPAN_NAMES, clip_ranges, span_flags, span_map

Message = Mapping[str, Any]
Conversation = Sequence[Message]
Segments = Sequence[tuple[str, str]]
AnswerPrefix = str | Segments | None
"""What the answer begins with; parts of it may be named, as those of an instruction."""
CLIP = -1
"""Stand-in for a clip where no token marks one; not an id."""


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """A row before padding."""

    ids: list[int]
    is_audio: list[bool]
    is_text: list[bool]
    segments: dict[str, list[bool]]
    clips: list[AudioClip]


class PromptToken(NamedTuple):
    """A token of a rendered prompt."""

    id: int
    start: int
    """Start of the characters that the token stands for, half-open with ``stop``."""
    stop: int
    segment: str | None = None
    """Name of the part that the token belongs to, if it is no part of the instruction."""


class PromptBuilder:
    """Chat template, tokenizer and feature extractor of a checkpoint, spans included."""

    options: frozenset[str] = frozenset()
    """Options of ``build`` that the family's prompts have besides."""

    def __init__(
        self,
        *,
        tokenizer: Any,
        feature_extractor: Any,
        chat_template: str,
        front_end: FrontEnd,
        audio_text: str | None = None,
    ) -> None:
        """Take the processor's parts; nothing is read yet.

        Args:
            tokenizer: tokenizer of the checkpoint.
            feature_extractor: the extractor that the front-end makes features with.
            chat_template: chat template of the checkpoint.
            front_end: front-end of the model.
            audio_text: text that stands for a clip, if the template takes messages of plain text.
        """
        self.tokenizer, self.feature_extractor = tokenizer, feature_extractor
        self.chat_template, self.front_end = chat_template, front_end
        self.audio_text = audio_text

    def build(
        self,
        conversations: Sequence[Conversation],
        segments: Sequence[Segments | None],
        answer_prefix: AnswerPrefix,
        truncate: bool,
        model: Any,
        **options: Any,
    ) -> ALMInput:
        """Left-padded rows, one per conversation.

        Args:
            conversations: chat messages.
            segments: named parts of the instruction.
            answer_prefix: text behind the generation prompt, or named parts of it.
            truncate: whether over-long audio is cut.
            model: the model that the prompts are for; most families need not ask it anything.
            options: of the family.
        """
        clips = self._read_clips(conversations, partial(self.read_clip, truncate=truncate))
        return self._batch([
            self._prompt(conversation, parts, answer_prefix, row_clips)
            for conversation, parts, row_clips in zip(conversations, segments, clips, strict=True)
        ])  # fmt: skip

    def _batch(self, prompts: Sequence[PromptRow]) -> ALMInput:
        width = max(len(prompt.ids) for prompt in prompts)
        pad = self.tokenizer.pad_token_id
        if pad is None:
            pad = self.tokenizer.eos_token_id or 0
        audio = self.front_end.tokens
        tokens, mask, flags, ranges = [], [], [], []
        for prompt in prompts:
            n_pad = width - len(prompt.ids)
            empty = [False] * n_pad
            tokens.append([pad] * n_pad + prompt.ids)
            mask.append([0] * n_pad + [1] * len(prompt.ids))
            is_audio = empty + prompt.is_audio
            flags.append(
                span_flags(
                    mask[-1],
                    empty + prompt.is_text,
                    is_audio=is_audio,
                    is_marker=[i in audio.markers for i in tokens[-1]],
                    segments={name: empty + part for name, part in prompt.segments.items()},
                )
            )
            if not self.front_end.is_memory:
                ranges.append(clip_ranges(is_audio, [clip.n_tokens for clip in prompt.clips]))
        attention_mask = torch.tensor(mask)
        return ALMInput(
            tokens=torch.tensor(tokens),
            attention_mask=attention_mask,
            position_ids=positions_from_mask(attention_mask),
            spans=span_map(flags, width, audio.seconds_per_token, ranges),
            clips=tuple(clip for prompt in prompts for clip in prompt.clips),
            clip_rows=tuple(row for row, prompt in enumerate(prompts) for _ in prompt.clips),
        )

    def _read_clips(
        self, conversations: Sequence[Conversation], read: Callable[[AudioSource], AudioClip]
    ) -> list[list[AudioClip]]:
        """The clips of every conversation; a source that occurs twice is read once."""
        known: dict[Any, AudioClip] = {}
        rows: list[list[AudioClip]] = []
        for conversation in conversations:
            rows.append([])
            for source in _audio_sources(conversation):
                key = str(source) if isinstance(source, str | Path) else id(source)
                if key not in known:
                    known[key] = source if isinstance(source, AudioClip) else read(source)
                rows[-1].append(known[key])
        return rows

    def read_clip(self, source: AudioSource, truncate: bool = False) -> AudioClip:
        """A clip as the encoder reads it; prompts that share it share its encoding."""
        waveform = read_audio(
            source,
            sampling_rate=self.feature_extractor.sampling_rate,
            max_seconds=self.front_end.tokens.max_seconds,
            truncate=truncate,
        )
        samples = samples_with_gradient(source, waveform.sampling_rate)
        if samples is None:
            windows = self.front_end.windows_of(waveform, self.feature_extractor)
        else:
            windows = windows_with_gradient(
                self.front_end, self.feature_extractor, waveform, samples
            )
        return self.front_end.clip(
            *windows,
            name=waveform.name,
            seconds=waveform.seconds,
            notes=waveform.notes,
        )

    def _prompt(
        self,
        conversation: Conversation,
        segments: Segments | None,
        answer_prefix: AnswerPrefix,
        clips: list[AudioClip],
    ) -> PromptRow:
        rendered, starts, texts = self._render(conversation)
        parts_of_prefix = named_parts(answer_prefix)
        prefix = "".join(text for _, text in parts_of_prefix)
        named = _segment_ranges(segments, starts, texts)
        named += _segment_ranges(parts_of_prefix, [len(rendered)], [prefix])
        rendered += prefix
        inside: dict[str, list[tuple[int, int]]] = {}
        for name, start, stop in named:
            inside.setdefault(name, []).append((start, stop))
        tokens = self._tokenise(rendered, conversation)
        ids: list[int] = []
        is_audio: list[bool] = []
        is_text: list[bool] = []
        apart = {token.segment for token in tokens if token.segment is not None}
        parts: dict[str, list[bool]] = {name: [] for name in (*inside, *apart)}
        remaining = list(clips)
        placeholder = self._placeholder()
        whole = [(s, s + len(t)) for s, t in zip(starts, texts, strict=True)]
        for token, start, stop, segment in tokens:
            if token == placeholder and not remaining:
                n_placeholders = sum(one.id == placeholder for one in tokens)
                raise _placeholder_error(len(clips), n_placeholders)
            new = [token]
            if token == placeholder:
                new = self.front_end.prompt_ids(remaining.pop(0))
                is_audio += [placeholder in (i, CLIP) for i in new]
            else:
                is_audio.append(False)
            ids += new
            n = len(new)
            is_text += [segment is not None or _overlaps(whole, start, stop)] * n
            for name, flags in parts.items():
                flags += [segment == name or _overlaps(inside.get(name, ()), start, stop)] * n
        if remaining:
            raise _placeholder_error(len(clips), len(clips) - len(remaining))
        return PromptRow(ids=ids, is_audio=is_audio, is_text=is_text, segments=parts, clips=clips)

    def _placeholder(self) -> int:
        given = self.front_end.tokens.placeholder
        return CLIP if given is None else given

    def _tokenise(self, rendered: str, conversation: Conversation) -> list[PromptToken]:
        """The tokens of a prompt.

        Where no id tells a clip, ``CLIP`` stands for it, and the text around it is tokenised piece
        by piece, with the tokenizer's own special tokens in the first at most.
        """
        audio = self.front_end.tokens
        if audio.text is None:
            return self._tokens(rendered)
        found: list[PromptToken] = []
        at = 0
        for index, piece in enumerate(rendered.split(audio.text)):
            if index > 0:
                found.append(PromptToken(CLIP, at, at + len(audio.text)))
                at += len(audio.text)
            found += self._tokens(piece, at, add_special_tokens=index == 0 and audio.prepend_bos)
            at += len(piece)
        return found

    def _tokens(self, text: str, at: int = 0, **options: Any) -> list[PromptToken]:
        """The tokens of a piece that begins at a character of the prompt."""
        with any_failure(
            InputError, f"tokenising {text[:40]!r}", "Give text that the tokenizer knows."
        ):
            encoding = self.tokenizer(text, return_offsets_mapping=True, **options)
        return [
            PromptToken(token, at + start, at + stop)
            for token, (start, stop) in zip(
                encoding["input_ids"], encoding["offset_mapping"], strict=True
            )
        ]

    def _render(self, conversation: Conversation) -> tuple[str, list[int], list[str]]:
        """The prompt, and where each text item of a user turn starts in it.

        The template is rendered with a private-use character in place of each text, because
        searching the prompt for the text itself would find it in the template.
        """
        texts: list[str] = []

        def stand_in(text: str) -> str:
            texts.append(text)
            return chr(0xE000 + len(texts) - 1)

        marked = [
            {**message, "content": _map_texts(message["content"], stand_in)}
            if message.get("role") == "user"
            else dict(message)
            for message in conversation
        ]
        skeleton = self._apply_template(marked)
        rendered, starts = "", []
        for char in skeleton:
            index = ord(char) - 0xE000
            if 0 <= index < len(texts):
                starts.append(len(rendered))
                rendered += texts[index]
            else:
                rendered += char
        if rendered != self._apply_template(conversation) or len(starts) != len(texts):
            raise InputError(
                "rendering the chat template: it rewrites the text of a message or leaves it out, "
                "so that spans cannot be located. Give the text without leading or trailing white "
                "space, and in a message that this model's template shows (some show no user's "
                "words beside audio)."
            )
        return rendered, starts, texts

    def _apply_template(self, conversation: Conversation) -> str:
        messages = [_with_names(message) for message in conversation]
        if self.audio_text is not None:
            messages = [{**m, "content": self._as_text(m["content"])} for m in messages]
        return render_chat(self.tokenizer, messages, self.chat_template)

    def _as_text(self, content: Any) -> str:
        """A message of parts as one text."""
        if isinstance(content, str):
            return content
        audio = self.audio_text or ""
        return "".join(item["text"] if item.get("type") == "text" else audio for item in content)


def named_parts(prefix: AnswerPrefix) -> Segments:
    """The parts of an answer's beginning; one that is no more than text is called so."""
    return [("text", prefix)] if isinstance(prefix, str) else prefix or ()


def _with_names(message: Message) -> dict[str, Any]:
    """A message with names in place of clips, all of which a template would copy."""
    if not isinstance(content := message.get("content"), list | tuple):
        return dict(message)
    named = [
        {key: value.name if isinstance(value, AudioClip) else value for key, value in item.items()}
        if isinstance(item, Mapping)
        else item
        for item in content
    ]
    return {**message, "content": named}


def _segment_ranges(
    segments: Segments | None, starts: list[int], texts: list[str]
) -> list[tuple[str, int, int]]:
    """Character ranges of named segments; ``text`` itself is no segment."""
    if not segments:
        return []
    if len(texts) != 1 or "".join(text for _, text in segments) != texts[0]:
        raise InputError(
            "naming segments: their texts must join to the one text of the user's message, got "
            f"{[text for _, text in segments]} for {texts}."
        )
    if taken := sorted({name for name, _ in segments} & SPAN_NAMES - {"text"}):
        raise InputError(
            f"naming segments: {', '.join(taken)} name spans of every input. Choose other names."
        )
    ranges, at = [], starts[0]
    for name, text in segments:
        if name != "text":
            ranges.append((name, at, at + len(text)))
        at += len(text)
    return ranges


def _overlaps(ranges: Sequence[tuple[int, int]], start: int, stop: int) -> bool:
    return any(start < r_stop and stop > r_start for r_start, r_stop in ranges)


def _placeholder_error(n_clips: int, n_placeholders: int) -> InputError:
    return InputError(
        f"building the prompt: it has {n_placeholders} audio placeholders for {n_clips} clips. "
        "Give one clip per placeholder; a chat message with an audio item makes its own."
    )


def _map_texts(content: Any, change: Any) -> Any:
    if isinstance(content, str):
        return change(content)
    return [
        {**item, "text": change(item["text"])} if isinstance(item.get("text"), str) else dict(item)
        for item in content
    ]


def _audio_sources(conversation: Conversation) -> list[AudioSource | AudioClip]:
    sources: list[AudioSource | AudioClip] = []
    for message in conversation:
        if isinstance(message["content"], str):
            continue
        for item in message["content"]:
            if item.get("type") not in ("audio", "audio_url"):
                continue
            given = [item[key] for key in ("audio", "path", "url", "audio_url") if key in item]
            if len(given) != 1:
                raise InputError(
                    f"reading an audio item with keys {sorted(item)}: expected one of "
                    "'audio', 'path' or 'url' with a file, an array or (array, rate)."
                )
            source = given[0]
            if isinstance(source, str) and source.startswith(("http://", "https://")):
                raise InputError(f"reading {source}: download the clip and give its path.")
            sources.append(source)
    return sources


def segments_by_row(segments: Any, n_rows: int) -> list[Segments | None]:
    """Lists of segments, one per row; a single list, or None, is shared.

    Raises:
        InputError: lists for another number of rows.
    """
    is_shared = not segments or isinstance(segments[0][0], str)
    rows = [segments] * n_rows if is_shared else list(segments)
    if len(rows) != n_rows:
        raise InputError(
            f"naming segments: {len(rows)} lists of segments for {n_rows} rows. Give one per row, "
            "or one for all."
        )
    return rows


def conversations_from(
    audio: Any, text: str | Sequence[str] | None, segments: Any
) -> tuple[list[Conversation], list[Segments | None]]:
    """Chat messages for ``prepare(audio, text)``: a list is one item per row.

    A nested list of audio puts several clips into one prompt; a single audio, text or list of
    segments is shared by all rows.

    Raises:
        InputError: lists of different lengths, or both text and segments.
    """
    if segments is not None and text is not None:
        raise InputError("preparing a prompt: give text or segments, not both.")
    if segments is not None:
        is_one_row = bool(segments) and isinstance(segments[0][0], str)
        rows_of_segments: Any = segments if is_one_row else [list(row) for row in segments]
        text = (
            "".join(part for _, part in segments)
            if is_one_row
            else ["".join(part for _, part in row) for row in segments]
        )
        segments = [rows_of_segments] if is_one_row else rows_of_segments
    audio_rows = audio if isinstance(audio, list) else [audio]
    text_rows = [text] if isinstance(text, str) or text is None else list(text)
    sizes = {len(rows) for rows in (audio_rows, text_rows) if len(rows) != 1}
    if len(sizes) > 1 or 0 in sizes:
        raise InputError(
            f"preparing a batch: {len(audio_rows)} audio rows and {len(text_rows)} texts. "
            "Give lists of one length, or one item to be shared."
        )
    n_rows = sizes.pop() if sizes else 1

    def row_of(rows: list[Any], row: int) -> Any:
        return rows[row if len(rows) > 1 else 0]

    conversations: list[Conversation] = []
    for row in range(n_rows):
        clips = row_of(audio_rows, row)
        clips = clips if isinstance(clips, list) else [] if clips is None else [clips]
        content: list[dict[str, Any]] = [{"type": "audio", "audio": clip} for clip in clips]
        words = row_of(text_rows, row)
        if words is not None:
            content.append({"type": "text", "text": words})
        if not content:
            raise InputError("preparing a prompt: give audio, text, or both.")
        conversations.append([{"role": "user", "content": content}])
    named = [None] * n_rows if segments is None else [row_of(segments, r) for r in range(n_rows)]
    return conversations, named
