"""Seed 001 with nothing but a plain Hugging Face model and PyTorch hooks.

Written from the definitions M-001-1 to M-001-8, not from the experiment's code. Depth d is
the residual stream after d blocks: it is patched before block d, or after the last one.
"""

from pathlib import Path

import soundfile
import torch
from torch import Tensor

from ob1_reference import PlainOB1, Prompt, _stretched

PATCHED = {
    "audio": ["audio"],
    "text": ["text"],
    "struct": ["audio_struct", "struct"],
    "readout": ["readout"],
    "all": ["audio", "text", "audio_struct", "struct", "readout", "sink"],
}


class PlainSemanticVsProsody(PlainOB1):
    """One checkpoint, asked one question about any clip."""

    def ask(self, clip: Path, question: str) -> Prompt:
        content = [{"type": "audio", "audio": str(clip)}, {"type": "text", "text": question}]
        rendered = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        samples, rate = soundfile.read(clip, dtype="float32")
        inputs = dict(
            self.processor(text=rendered, audio=[samples], sampling_rate=rate, return_tensors="pt")
        )
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return Prompt(inputs, self._spans(inputs["input_ids"][0].tolist(), question, None))

    def first_tokens(self, labels: list[str]) -> list[int]:
        return [self.processor.tokenizer.encode(label)[0] for label in labels]

    @torch.no_grad()
    def tuple_lens(self, prompt: Prompt) -> Tensor:
        """``[layer, vocab]`` as the seed has it: head and final norm on every layer's entry of
        ``hidden_states``, the last of which has been normed."""
        states = self.hf(**prompt.inputs, output_hidden_states=True).hidden_states
        readout = prompt.n - 1
        return torch.stack([self.hf.lm_head(self.decoder.norm(h[0, readout])) for h in states[1:]])

    @torch.no_grad()
    def patched_at(self, base: Prompt, depth: int, positions: list[int], values: Tensor) -> Tensor:
        """``[vocab]`` at the readout, with positions of the stream at a depth replaced."""
        if depth == self.n_layers:
            return self.patched(base, depth - 1, positions, values)

        def hook(_: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            changed = args[0].clone()
            changed[0, positions] = values
            return (changed, *args[1:])

        handle = self.decoder.layers[depth].register_forward_pre_hook(hook)
        try:
            return self.logits(base)
        finally:
            handle.remove()

    def cells(
        self, base: Prompt, donor: Prompt, spans: list[str] | None = None
    ) -> dict[tuple[int, str], Tensor]:
        """Depth and span -> logits at the readout."""
        states = self.residuals(donor)
        return {
            (depth, name): self.patched_at(
                base,
                depth,
                [i for span in PATCHED[name] for i in base.spans[span]],
                torch.cat([_stretched(states[depth], span, base, donor) for span in PATCHED[name]]),
            )
            for depth in range(self.n_layers + 1)
            for name in spans or PATCHED
        }
