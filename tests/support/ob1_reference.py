"""OB1 with nothing but a plain Hugging Face model and PyTorch hooks, as seed 000's scripts did it.

Written from the definitions M-000-1 to M-000-13, not from the experiment's code: it finds
spans by counting the bytes of tokens, keeps the whole residual stream, multiplies the whole
vocabulary, and runs one full forward per patched cell. Only prompt texts are shared.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from hooked_alm.experiments.materials.ob1 import (
    EMOTIONS,
    LABELS,
    Emotion,
    PromptMode,
    prompt_segments,
)

PATCHED = {
    "label": ["label"],
    "text": ["text"],
    "audio": ["audio"],
    "audio_struct": ["audio_struct"],
    "struct": ["struct"],
    "readout": ["readout"],
    "text+readout": ["text", "readout"],
    "all": ["text", "audio", "audio_struct", "struct", "readout", "sink"],
}


@dataclass(frozen=True)
class Prompt:
    """Arguments of a Hugging Face forward, and which position is what."""

    inputs: dict[str, Tensor]
    spans: dict[str, list[int]]

    @property
    def n(self) -> int:
        return self.inputs["input_ids"].shape[1]


class PlainOB1:
    """One checkpoint, asked about clips that are spoken and instructed in the same language."""

    def __init__(self, checkpoint: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.hf = self._load(checkpoint, "sdpa")
        self.eager = self._load(checkpoint, "eager")
        self.decoder = self.hf.model.language_model
        self.n_layers = len(self.decoder.layers)

    @staticmethod
    def _load(checkpoint: Path, attention: str) -> Qwen2AudioForConditionalGeneration:
        return Qwen2AudioForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation=attention
        ).eval()

    def label_ids(self, language: str) -> list[int]:
        """First token of each label, in the order of ``EMOTIONS``."""
        tokenizer = self.processor.tokenizer
        return [tokenizer.encode(LABELS[language][emotion])[0] for emotion in EMOTIONS]

    def prompt(
        self,
        clip: Path,
        mode: PromptMode,
        named: Emotion | None,
        order: tuple[Emotion, ...] = EMOTIONS,
    ) -> Prompt:
        """The prompt of one OB1-named clip, by way of the processor."""
        language, voice, _ = clip.stem.split("_")
        segments = prompt_segments(mode, language, voice=voice, named=named, order=order)
        text = "".join(part for _, part in segments)
        content = [{"type": "audio", "audio": str(clip)}, {"type": "text", "text": text}]
        rendered = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        samples, rate = soundfile.read(clip, dtype="float32")
        inputs = dict(
            self.processor(text=rendered, audio=[samples], sampling_rate=rate, return_tensors="pt")
        )
        # The plain forward would count pads too; `generate` and the experiment do not.
        mask = inputs["attention_mask"]
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        label = None
        if len(segments) == 3:
            start = len(segments[0][1].encode())
            label = start, start + len(segments[1][1].encode())
        return Prompt(inputs, self._spans(inputs["input_ids"][0].tolist(), text, label))

    def _spans(self, ids: list[int], text: str, label: tuple[int, int] | None) -> dict:
        """Positions by their tokens: the instruction is what stands between audio and end."""
        tokens = self.processor.tokenizer.convert_ids_to_tokens(ids)
        last = len(ids) - 1
        spans: dict[str, list[int]] = {"sink": [0], "readout": [last]}
        spans["audio"] = [i for i, token in enumerate(tokens) if token == "<|AUDIO|>"]
        spans["audio_struct"] = [
            i for i, token in enumerate(tokens) if token in ("<|audio_bos|>", "<|audio_eos|>")
        ]
        # The template puts a line break behind the audio, which is no instruction.
        first = tokens.index("<|audio_eos|>") + 2
        end = first + tokens[first:].index("<|im_end|>")
        spans["text"] = list(range(first, end))
        # Byte-level tokens: one character of a token is one byte of text, but for added words.
        added = self.processor.tokenizer.get_added_vocab()
        n_bytes = [len(t.encode()) if t in added else len(t) for t in tokens[first:end]]
        starts = [sum(n_bytes[:i]) for i in range(len(n_bytes) + 1)]
        assert starts[-1] == len(text.encode())
        spans["label"] = [
            i
            for i, start, stop in zip(spans["text"], starts, starts[1:], strict=False)
            if label is not None and start < label[1] and stop > label[0]
        ]
        taken = {i for positions in spans.values() for i in positions}
        spans["struct"] = [i for i in range(last) if i not in taken]
        return spans

    @torch.no_grad()
    def logits(self, prompt: Prompt) -> Tensor:
        """``[vocab]`` at the readout."""
        return self.hf(**prompt.inputs).logits[0, -1]

    @torch.no_grad()
    def residuals(self, prompt: Prompt) -> list[Tensor]:
        """``[1, pos, d_model]`` after 0, 1, ... L blocks, from hooks."""
        kept: list[Tensor] = []
        with ExitStack() as stack:
            before = self.decoder.layers[0].register_forward_pre_hook(
                lambda _, args: kept.append(args[0])
            )
            stack.callback(before.remove)
            for block in self.decoder.layers:
                after = block.register_forward_hook(lambda _, args, output: kept.append(output))
                stack.callback(after.remove)
            self.hf(**prompt.inputs)
        return kept

    @torch.no_grad()
    def lens(self, prompt: Prompt) -> Tensor:
        """``[depth, vocab]`` at the readout: final norm and head on the states of the hooks."""
        states = self.residuals(prompt)
        return torch.stack([self.hf.lm_head(self.decoder.norm(r))[0, -1] for r in states])

    @torch.no_grad()
    def seed_lens(self, prompt: Prompt) -> Tensor:
        """``[depth, vocab]`` as the seed has it: the head alone, on ``range(num_layers)``."""
        states = self.hf(**prompt.inputs, output_hidden_states=True).hidden_states
        return torch.stack([self.hf.lm_head(states[i])[0, -1] for i in range(self.n_layers)])

    @torch.no_grad()
    def attention(self, prompt: Prompt) -> list[Tensor]:
        """``[head, key]`` of the readout by layer, from eager attention."""
        found: list[Tensor] = []
        with ExitStack() as stack:
            for block in self.eager.model.language_model.layers:
                handle = block.self_attn.register_forward_hook(
                    lambda _, args, output: found.append(output[1][0, :, -1])
                )
                stack.callback(handle.remove)
            self.eager(**prompt.inputs)
        return found

    @torch.no_grad()
    def patched(self, base: Prompt, layer: int, positions: Sequence[int], values: Tensor) -> Tensor:
        """Logits at the readout, with positions of a layer's output replaced."""

        def hook(_: object, args: object, output: Tensor) -> Tensor:
            changed = output.clone()
            for position, value in zip(positions, values, strict=True):
                changed[0, position] = value
            return changed

        handle = self.decoder.layers[layer].register_forward_hook(hook)
        try:
            return self.logits(base)
        finally:
            handle.remove()

    def sweep(
        self, base: Prompt, donor: Prompt, layers: Iterable[int]
    ) -> dict[tuple[int, str], Tensor]:
        """Corrected patching: block and span -> logits at the readout."""
        states = self.residuals(donor)
        return {
            (layer, name): self.patched(
                base,
                layer,
                [i for span in spans for i in base.spans[span]],
                # The donor's state at the very place that is patched: after block `layer`.
                torch.cat([_stretched(states[layer + 1], span, base, donor) for span in spans]),
            )
            for layer in layers
            for name, spans in PATCHED.items()
        }

    @torch.no_grad()
    def seed_sweep(
        self, base: Prompt, donor: Prompt, layers: Iterable[int]
    ) -> dict[tuple[int, str], Tensor]:
        """The seed's patching, defects included: donor one block early, audio = all but text,
        positions counted from the start."""
        hidden = self.hf(**donor.inputs, output_hidden_states=True).hidden_states
        is_text = torch.zeros(base.n, dtype=torch.bool)
        is_text[base.spans["text"]] = True
        common = min(base.n, donor.n)
        cells = {}
        for layer in layers:
            for name, mask in (("text", is_text), ("audio", ~is_text)):
                where = [i for i in mask.nonzero().flatten().tolist() if i < common]
                cells[layer, name] = self.patched(base, layer, where, hidden[layer][0, where])
        return cells


def _stretched(states: Tensor, span: str, base: Prompt, donor: Prompt) -> Tensor:
    """The donor's rows of a span; the rows of a clip of another length, resampled in time."""
    rows, n = states[0, donor.spans[span]], len(base.spans[span])
    if len(rows) == n:
        return rows
    assert span == "audio"
    in_time = rows.T[None]
    return F.interpolate(in_time, size=n, mode="linear", align_corners=True)[0].T
