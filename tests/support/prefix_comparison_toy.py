"""A tiny text model with a tokenizer, items of a code agent, and a plain Hugging Face run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hooked_alm.experiments.prefix_comparison.experiment import PrefixComparison
from hooked_alm.experiments.prefix_comparison.settings import PrefixComparisonConfig
from tiny import VOCAB, build_tokenizer, randomise

N_LAYERS, N_CTX = 3, 400
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if tools %}tools {{ tools[0]['name'] }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BODIES = (
    "    return x + 1\n",
    "    if x:\n        return 2\n    return x\n",
    "    for a in x:\n        b = a * 3\n    return b\n",
    "    s = 'word'\n    return s\n",
)


def text_checkpoint(folder: Path) -> Path:
    """A random Qwen2 with grouped heads and a byte-level tokenizer."""
    config = Qwen2Config(
        hidden_size=54, intermediate_size=34, num_hidden_layers=N_LAYERS, num_attention_heads=6,
        num_key_value_heads=2, head_dim=10, vocab_size=VOCAB, max_position_embeddings=N_CTX,
        rms_norm_eps=1e-5, rope_theta=5000.0, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    randomise(model)
    model.save_pretrained(folder)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def item(number: int, **changes: Any) -> dict[str, Any]:
    """An agentic and an assisted prefix, of unequal length."""
    body = BODIES[number % len(BODIES)]
    tool = f"def f{number}(x): a = {number}"
    return {
        "id": f"he-{number}",
        "continuation": body,
        "conditions": {
            "agentic": {
                "prefix": [
                    ["instruction", "Write it. "], ["spec", f"f{number} adds. "],
                    ["tool_response", tool], ["text", "\nassistant\n"],
                ],
                "outcome": number % 2 == 0,
            },
            "assisted": {
                "prefix": [
                    ["instruction", "Write it. "], ["spec", f"f{number} adds. "],
                    ["text", "\nassistant\n"],
                ],
                "outcome": number % 4 < 2,
            },
        },
        **changes,
    }  # fmt: skip


def write_items(file: Path, items: Sequence[dict[str, Any]]) -> Path:
    file.write_text("\n".join(json.dumps(one, ensure_ascii=False) for one in items), "utf-8")
    return file


def experiment(model: Path | str, items: Path | str, **settings: Any) -> PrefixComparison:
    values = {"n_threads": 1, "n_resamples": 1000, "n_shown": 1, "n_bins": 4, **settings}
    return PrefixComparison(PrefixComparisonConfig(model=str(model), items=str(items), **values))


class Plain(NamedTuple):
    """What a plain forward gives for the positions that predict a continuation."""

    log_p: Tensor
    """``[depth, token, vocab]``"""
    attention: Tensor
    """``[layer, head, token, key]``"""


@torch.no_grad()
def plain_hf(hf: Any, arguments: dict[str, Any], start: int, *, source: str = "hooks") -> Plain:
    """One eager forward of Hugging Face's model; the lens as either variant reads it.

    Args:
        hf: a model loaded with eager attention.
        arguments: of its forward, with position ids.
        start: position of the continuation's first token.
        source: ``hooks`` takes the last residual from the last block; ``hf_tuple`` takes all from
            ``hidden_states`` and norms them, the last one for the second time.
    """
    decoder = getattr(hf.model, "language_model", hf.model)
    last: list[Tensor] = []
    handle = decoder.layers[-1].register_forward_hook(lambda _, args, out: last.append(out))
    out = hf(**arguments, output_hidden_states=True, output_attentions=True)
    handle.remove()
    states = list(out.hidden_states)
    if source == "hooks":
        states[-1] = last[0]
    stop = arguments["input_ids"].shape[1] - 1
    rows = torch.stack(states)[:, 0, start - 1 : stop]
    logits = hf.lm_head(decoder.norm(rows))
    if source == "hooks":
        assert torch.equal(logits[-1], out.logits[0, start - 1 : stop])
    attention = torch.stack(out.attentions)[:, 0, :, start - 1 : stop]
    return Plain(logits.double().log_softmax(-1), attention)


def load_hf(folder: Path | str) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def ids_and_positions(ids: Sequence[int]) -> dict[str, Tensor]:
    """Arguments of one unpadded row."""
    tokens = torch.tensor([list(ids)])
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "position_ids": torch.arange(len(ids))[None],
    }


def js_of(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Card M-002-4 as written: ``log m = logsumexp(log p, log q) − ln 2``."""
    log_m = torch.logsumexp(torch.stack([log_p, log_q]), 0) - torch.tensor(2.0).double().log()
    parts = [(one.exp() * (one - log_m)).sum(-1) for one in (log_p, log_q)]
    return (parts[0] + parts[1]) / 2
