"""Compare a converted model with Hugging Face, depth by depth.

The two models are loaded one after the other and never held together.
"""

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from hooked_alm.inputs import ALMInput, positions_from_mask
from hooked_alm.model import HookedALM

from .registry import DTYPES, find_folder, load_model

Run = Mapping[str, Tensor]
"""``depth 0`` .. ``depth L`` and ``logits`` of one run."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row of the table: a depth of one prompt, or its logits."""

    prompt: str
    where: str
    max_abs_difference: float
    is_equal: bool
    argmax_agreement: float | None = None
    """Share of positions with the same top token; logits only."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What ``verify`` found."""

    model: str
    dtype: str
    attn_implementation: str
    tolerance: float
    rows: tuple[Comparison, ...]

    @property
    def is_equal(self) -> bool:
        """Whether every depth and all logits are bit-identical."""
        return all(row.is_equal for row in self.rows)

    @property
    def passed(self) -> bool:
        """Whether every difference is within the tolerance; without one, the same as equal."""
        return self.is_equal or (
            self.tolerance > 0
            and all(row.max_abs_difference <= self.tolerance for row in self.rows)
        )

    def verdict(self) -> str:
        """One line."""
        if self.is_equal:
            return "bit-identical to HF: yes"
        first = next(row for row in self.rows if not row.is_equal)
        worst = max(row.max_abs_difference for row in self.rows)
        within = f", within the tolerance {self.tolerance:g}" if self.passed else ""
        return (
            f"bit-identical to HF: no (first at {first.where} of prompt {first.prompt!r}, "
            f"largest difference {worst:.3g}{within})"
        )

    def table(self) -> str:
        """The comparison as text, the verdict last."""
        lines = [
            f"{self.model}  {self.dtype}  {self.attn_implementation}",
            f"{'prompt':<22}{'where':<10}{'max |difference|':>18}{'equal?':>8}{'argmax':>9}",
        ]
        for row in self.rows:
            agreement = "" if row.argmax_agreement is None else f"{row.argmax_agreement:.1%}"
            lines.append(
                f"{row.prompt:<22}{row.where:<10}{row.max_abs_difference:>18.3g}"
                f"{'yes' if row.is_equal else 'no':>8}{agreement:>9}"
            )
        return "\n".join([*lines, self.verdict()])


def verify(
    name_or_dir: str,
    *,
    dtype: str | None = None,
    attn_implementation: str = "sdpa",
    device: str = "cpu",
    revision: str | None = None,
    tolerance: float = 0.0,
) -> Verification:
    """Run the same prompts through Hugging Face's model and ours.

    Prompts are random ids around random spectrograms: one with a clip, a left-padded pair with two
    and one clips, one without audio.

    Args:
        name_or_dir: folder or hub id.
        dtype: of both models; None is the checkpoint's.
        attn_implementation: of both models.
        device: of both models.
        revision: on the hub.
        tolerance: largest difference that still passes; 0 demands equality.

    Raises:
        ConversionError: see ``load_model``.
        InputError: see ``load_model``.
    """
    folder = find_folder(name_or_dir, revision)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    ours = load_model(folder, device=device, **options)  # refuses early what cannot be converted
    prompts = sample_prompts(ours)
    options["dtype"] = ours.cfg.dtype
    del ours
    gc.collect()
    expected = _run_hugging_face(folder, prompts, device, options)
    gc.collect()
    model = load_model(folder, device=device, **options)
    rows: list[Comparison] = []
    for name, inputs in prompts.items():
        rows += compare(name, expected[name], run_ours(model, model.encode(**inputs)), inputs)
    names = {value: key for key, value in DTYPES.items()}
    return Verification(
        model=str(name_or_dir),
        dtype=names[model.cfg.dtype],
        attn_implementation=attn_implementation,
        tolerance=tolerance,
        rows=tuple(rows),
    )


def sample_prompts(model: HookedALM, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Inputs of the Hugging Face ``forward``, made from the sizes in the config alone."""
    generator = torch.Generator().manual_seed(seed)
    audio = model.audio

    def row(n_text: int, clips: list[int]) -> tuple[list[int], list[int]]:
        ids = torch.randint(0, model.cfg.d_vocab, (n_text,), generator=generator).tolist()
        placeholder = -1 if audio is None else audio.tokens.placeholder
        ids = [i if i != placeholder else (i + 1) % model.cfg.d_vocab for i in ids]
        for at, n_frames in enumerate(clips, start=1):
            assert audio is not None
            ids[at * 3 : at * 3] = [placeholder] * audio.n_tokens(n_frames)
        return ids, clips

    if audio is None:
        batches = {"text": [row(17, [])], "left-padded": [row(9, []), row(14, [])]}
        return {name: _batch(rows, None, generator) for name, rows in batches.items()}
    shape = audio.feature_shape
    long, short = shape[1], max(shape[1] // 3, 8)
    batches = {
        "one clip": [row(17, [short])],
        "two clips, padded": [row(15, [short, short + 5]), row(12, [long])],
        "text": [row(17, [])],
    }
    return {name: _batch(rows, shape, generator) for name, rows in batches.items()}


def _batch(
    rows: list[tuple[list[int], list[int]]],
    feature_shape: tuple[int, int] | None,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    width = max(len(ids) for ids, _ in rows)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in rows])
    inputs = {
        "input_ids": torch.tensor([[0] * (width - len(ids)) + ids for ids, _ in rows]),
        "attention_mask": mask,
        "position_ids": positions_from_mask(mask),
    }
    frames = [n for _, clips in rows for n in clips]
    if frames and feature_shape is not None:
        inputs["input_features"] = torch.randn(len(frames), *feature_shape, generator=generator)
        heard = torch.arange(feature_shape[1]) < torch.tensor(frames)[:, None]
        inputs["feature_attention_mask"] = heard.long()
    return inputs


@torch.no_grad()
def _run_hugging_face(
    folder: Path, prompts: Mapping[str, dict[str, Tensor]], device: str, options: dict[str, Any]
) -> dict[str, Run]:
    architecture = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    model_class = getattr(transformers, architecture)
    transformers.utils.logging.disable_progress_bar()
    try:
        model = model_class.from_pretrained(folder, **options).to(device).eval()
    finally:
        transformers.utils.logging.enable_progress_bar()
    decoder = model.get_decoder()
    runs: dict[str, Run] = {}
    for name, inputs in prompts.items():
        states: list[Tensor] = []

        def keep(_: Any, args: Any, kwargs: Any, states: list[Tensor] = states) -> None:
            states.append((args[0] if args else kwargs["hidden_states"]).cpu())

        handles = [
            module.register_forward_pre_hook(keep, with_kwargs=True)
            for module in (*decoder.layers, decoder.norm)
        ]
        logits = model(**{key: value.to(device) for key, value in inputs.items()}).logits.cpu()
        for handle in handles:
            handle.remove()
        runs[name] = {**{f"depth {k}": state for k, state in enumerate(states)}, "logits": logits}
    return runs


@torch.no_grad()
def run_ours(model: HookedALM, x: ALMInput) -> Run:
    """Residual stream at every depth, and logits."""
    last = model.cfg.n_layers - 1
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(last + 1)]
    names.append(f"blocks.{last}.hook_resid_post")
    logits, cache = model.run_with_cache(x, names_filter=names, return_cache_object=False)
    depths = {f"depth {k}": cache[name].cpu() for k, name in enumerate(names)}
    return {**depths, "logits": logits.cpu()}


def compare(prompt: str, expected: Run, got: Run, inputs: Mapping[str, Tensor]) -> list[Comparison]:
    """Compare two runs at real positions, the only ones that mean anything."""
    real = inputs["attention_mask"].bool()
    rows = []
    for where, theirs in expected.items():
        a, b = theirs[real], got[where][real]
        agreement = None
        if where == "logits":
            agreement = float((a.argmax(-1) == b.argmax(-1)).float().mean())
        rows.append(
            Comparison(
                prompt=prompt,
                where=where,
                max_abs_difference=float((a.double() - b.double()).abs().max()),
                is_equal=torch.equal(a, b),
                argmax_agreement=agreement,
            )
        )
    return rows
