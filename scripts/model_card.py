"""Parts that the cards of all bundled models share."""

import json
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

Score = dict[str, int | float]
"""Numbers ``right``, ``n`` and ``accuracy`` of some answers."""
Metrics = dict[str, dict[str, Score]]
"""Clip set -> kind of question -> score."""


def score(right: Iterable[bool]) -> Score:
    """The share of answers that are right."""
    found = list(right)
    n = sum(found)
    return {"right": n, "n": len(found), "accuracy": round(n / len(found), 4)}


def make_of(
    model: Qwen2AudioForConditionalGeneration, processor: Qwen2AudioProcessor
) -> dict[str, Any]:
    """The sizes that a card names."""
    audio, text = model.config.audio_config, model.config.text_config
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tower": f"{audio.encoder_layers} layers of width {audio.d_model}",
        "decoder": (
            f"{text.num_hidden_layers} layers of width {text.hidden_size} with "
            f"{text.num_attention_heads} query and {text.num_key_value_heads} key-value heads"
        ),
        "vocabulary": text.vocab_size,
        "mels": processor.feature_extractor.feature_size,
        "chunk": processor.feature_extractor.chunk_length,
    }


def table(metrics: Metrics, title: str, rows: Mapping[str, str], sets: Mapping[str, str]) -> str:
    """Scores by kind of question and clip set.

    Args:
        metrics: see ``Metrics``; a set may lack a kind.
        title: title of the first column.
        rows: kind of question -> how the table says it.
        sets: clip set -> its column's title.
    """
    lines = [f"| {title} | " + " | ".join(sets.values()) + " |", "|---" * (len(sets) + 1) + "|"]
    for kind, said in rows.items():
        cells = [_cell(metrics[name].get(kind)) for name in sets]
        lines.append(f"| {said} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(found: Score | None) -> str:
    if found is None:
        return "–"
    return f"{100 * found['accuracy']:.1f} % ({found['right']}/{found['n']})"


def write(folder: Path, text: str, metrics: Metrics) -> None:
    """Write ``README.md``, paragraphs wrapped again after the numbers went in; ``metrics.json``."""
    (folder / "README.md").write_text(wrapped(text), encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def wrapped(text: str) -> str:
    """A card with its paragraphs wrapped; tables, code and headings are as they were."""
    blocks = text.strip().split("\n\n")
    lines = [b if b[0] in "|# " else textwrap.fill(b, 100, break_on_hyphens=False) for b in blocks]
    return "\n\n".join(lines) + "\n"
