"""Compare a converted model with Hugging Face, depth by depth.

The two models are loaded one after the other and never held together.
"""

import gc
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from hooked_alm.display import Shown, Summary
from hooked_alm.errors import ConversionError
from hooked_alm.inputs import ALMInput, AudioClip, ModelInput, text_input
from hooked_alm.model import HookedALM
from hooked_alm.points import point_of

from .deltas import write_checkpoint
from .family import Family
from .folders import read_config
from .hugging_face import run_hugging_face
from .loading import DTYPES, lay_out, load_model, open_checkpoint, own_checkpoint
from .registry import FAMILIES, load_family
from .rules import plan_of

DepthValues = Mapping[str, Tensor]
"""Values of one run by name: ``depth 0`` .. ``depth L`` and ``logits``."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A row of the table: a depth of one prompt, or its logits."""

    prompt: str
    where: str
    """Depth, or name of the hook point."""
    max_abs_difference: float
    is_equal: bool
    argmax_agreement: float | None = None
    """Share of positions with the same top token; logits only."""
    at: Mapping[str, int] = field(default_factory=dict)
    """Axis -> index of the largest difference, in the padded batch."""

    def __str__(self) -> str:
        """The place in words."""
        at = "".join(f", {axis} {index}" for axis, index in self.at.items())
        return f"{self.where}{f' of prompt {self.prompt!r}' if self.prompt else ''}{at}"


@dataclass(frozen=True, kw_only=True)
class Accounting:
    """Account of a checkpoint whose model transformers has no class for."""

    model: str
    family: str
    n_tensors: int
    dropped: Mapping[str, str]
    """Tensor -> why it is left out."""
    evidence: str

    passed = True  # anything unaccounted for has raised

    def verdict(self) -> str:
        """The account in one line."""
        return f"no HF class: transformers has none for {self.family}; nothing was run against it."

    def table(self) -> str:
        """The account as text."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.dropped.items():
            reasons.setdefault(reason, []).append(name)
        lines = [
            f"{self.model}  {self.family}",
            self.verdict(),
            f"{self.n_tensors} tensors: {self.n_tensors - len(self.dropped)} fill parameters, "
            f"{len(self.dropped)} are left out, none is left over.",
            *(f"  {len(names)} x {reason} ({names[0]}, ...)" for reason, names in reasons.items()),
            "every field of its config is acted on, irrelevant for a stated reason, or at its "
            "default.",
            f"evidence in the tests: {self.evidence}",
        ]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True, repr=False)
class Verification(Shown):
    """Differences from Hugging Face, in the order of the run, prompt by prompt."""

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
        """Whether every difference is within the tolerance; without one, whether all are equal."""
        return self.is_equal or (
            self.tolerance > 0
            and all(row.max_abs_difference <= self.tolerance for row in self.rows)
        )

    @property
    def first(self) -> Comparison | None:
        """The first row that differs; None if all are equal."""
        return next((row for row in self.rows if not row.is_equal), None)

    @property
    def largest(self) -> Comparison:
        """The row with the largest difference; NaN is larger than any."""
        differences = [row.max_abs_difference for row in self.rows]
        return self.rows[int(np.argmax(np.nan_to_num(differences, nan=np.inf)))]

    def _summary(self) -> Summary:
        differing = [row for row in self.rows if not row.is_equal]
        return Summary(
            title=f"{self.model}  {self.dtype}  {self.attn_implementation}",
            facts=[("verdict", self.verdict()), ("compared", f"{len(self.rows)} values")],
            columns=("where", "max |difference|"),
            rows=[(str(row), f"{row.max_abs_difference:.3g}") for row in differing],
        )

    def verdict(self) -> str:
        """The result in one line."""
        if self.is_equal:
            return "bit-identical to HF: yes"
        worst = self.largest
        within = f", within the tolerance {self.tolerance:g}" if self.passed else ""
        return (
            f"bit-identical to HF: no (first at {self.first}; "
            f"largest difference {worst.max_abs_difference:.3g}{within}, at {worst})"
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
    components: dict[str, str] | None = None,
) -> Verification | Accounting:
    """Run the same prompts through Hugging Face's model and ours.

    Prompts are random ids around random spectrograms: one with a clip, a left-padded pair with two
    and one clips, one without audio; where cross-attention reads the clips, each has one. Where
    transformers has no class for the model there is nothing to run, and tensors and fields are
    accounted for instead.

    Args:
        name_or_dir: folder or hub id.
        dtype: dtype of both models; None is the checkpoint's.
        attn_implementation: attention kernel of both models.
        device: device of both models.
        revision: branch, tag or commit on the hub.
        tolerance: largest difference that still passes; 0 demands equality.
        components: see ``load_model``.

    Raises:
        ConversionError: see ``load_model``; or transformers' class does not read the checkpoint.
        InputError: see ``load_model``.
    """
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    where: dict[str, Any] = {"device": device, "components": components}
    layout = lay_out(name_or_dir, revision=revision, components=components, **options)
    family = layout.family
    if family.card.reference == "composed":
        found = plan_of(layout.model, open_checkpoint(layout), family.rules)
        return Accounting(
            model=str(name_or_dir),
            family=family.name,
            n_tensors=len(found.sources) + len(found.dropped),
            dropped=found.dropped,
            evidence=family.card.evidence,
        )
    is_twin = "delta" in layout.model.sources
    where |= {"name_or_dir": name_or_dir if is_twin else layout.folder, "revision": revision}
    # Refuses early what cannot be converted.
    ours = load_model(**where, **options)
    prompts = sample_prompts(ours)
    options["dtype"] = ours.cfg.dtype
    del ours
    gc.collect()
    depths = layout.model.depth_names()
    with tempfile.TemporaryDirectory(prefix="hooked-alm-") as whole:
        if is_twin:
            write_checkpoint(own_checkpoint(layout), Path(whole))
        folder = Path(whole) if is_twin else layout.folder
        hf = _load_hugging_face(folder, family, device, options)
        expected = {
            name: run_hugging_face(hf, layout.model, inputs, {*depths})
            for name, inputs in prompts.items()
        }
        del hf
    gc.collect()
    model = load_model(**where, **options)
    rows: list[Comparison] = []
    for name, inputs in prompts.items():
        theirs = {f"depth {k}": expected[name][depth] for k, depth in enumerate(depths)}
        theirs["logits"] = family.hf_logits(expected[name]["logits"], model.cfg)
        x = model.encode(**inputs)
        rows += compare(name, theirs, run_ours(model, x), x)
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

    def row(n_text: int, clips: list[int]) -> tuple[list[int], list[AudioClip]]:
        ids = torch.randint(0, model.cfg.d_vocab, (n_text,), generator=generator).tolist()
        placeholder = -1 if audio is None else audio.tokens.placeholder
        ids = [i if i != placeholder else (i + 1) % model.cfg.d_vocab for i in ids]
        heard = [] if audio is None else [audio.random_clip(n, generator) for n in clips]
        for at, clip in reversed([*enumerate(heard, start=1)]):  # the last first, apart from others
            assert audio is not None
            ids[at * 3 : at * 3] = [] if audio.is_memory else audio.prompt_ids(clip)
        return ids, heard

    if audio is None:
        batches = {"text": [row(17, [])], "left-padded": [row(9, []), row(14, [])]}
    else:
        long = audio.feature_shape[1]
        short = max(long // 3, 8)
        batches = {"one clip": [row(17, [short])]}
        if audio.is_memory:
            batches["padded"] = [row(15, [short]), row(12, [long])]
        else:
            batches["two clips, padded"] = [row(15, [short, short + 5]), row(12, [long])]
            batches["text"] = [row(17, [])]
    return {name: _batch(model, rows) for name, rows in batches.items()}


def _batch(model: HookedALM, rows: list[tuple[list[int], list[AudioClip]]]) -> dict[str, Tensor]:
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([[0] * (width - len(ids)) + ids for ids, _ in rows])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in rows])
    clips = [clip for _, heard in rows for clip in heard]
    if model.audio is None:
        return model.hf_arguments(text_input(input_ids=ids, attention_mask=mask))
    return model.hf_arguments(model.audio.input_from_features(ids, mask, None, clips))


def _load_hugging_face(folder: Path, family: Family, device: str, options: dict[str, Any]) -> Any:
    architecture = read_config(folder)["architectures"][0]
    model_class = getattr(transformers, family.hf_class or architecture)
    transformers.utils.logging.disable_progress_bar()
    try:
        model, loaded = model_class.from_pretrained(folder, output_loading_info=True, **options)
    finally:
        transformers.utils.logging.enable_progress_bar()
    if missing := sorted(loaded["missing_keys"]):
        raise ConversionError(
            f"verifying {folder}: transformers' {model_class.__name__} finds {len(missing)} of its "
            f"weights nowhere ({missing[0]}, ...), and would run with random ones. It does not "
            "read this release's names; verify a release that it reads."
        )
    return model.to(device).eval()


def compare_with_hf(model: HookedALM, hf: Any, x: ModelInput) -> Verification:
    """Differences between a model and Hugging Face's on the same prompts, hook point by hook point.

    Compared are the hook points that a module of Hugging Face reads or writes (the residual stream,
    q, k, v before their rotation, z, what attention and MLP write, the MLP's neurons) and logits,
    at real positions. ``first`` and ``largest`` say where; ``is_equal`` is for an ``assert``.

    Args:
        model: ours.
        hf: transformers' model of the same checkpoint in eval mode, or another with its
            ``get_decoder`` and ``logits``.
        x: prompts.

    Raises:
        InputError: a model in training mode, or of another number of blocks.
    """
    prompts = model.towards("text").to_input(x)
    inputs = model.hf_arguments(prompts)
    theirs = run_hugging_face(hf, model, inputs)
    family = load_family(FAMILIES[model.cfg.original_architecture])
    theirs["logits"] = family.hf_logits(theirs["logits"], model.cfg)
    names = [name for name in theirs if name != "logits"]
    with torch.no_grad():
        logits, cache = model.towards("text").run_with_cache(prompts, names_filter=names)
    ours = {**{name: cache[name].cpu() for name in names}, "logits": logits.cpu()}
    dtypes = dict.fromkeys(str(one).removeprefix("torch.") for one in (model.cfg.dtype, hf.dtype))
    return Verification(
        model=model.cfg.model_name,
        dtype=" against ".join(dtypes),
        attn_implementation=model.cfg.attn_implementation,
        tolerance=0.0,
        rows=tuple(compare("", theirs, ours, prompts)),
    )


@torch.no_grad()
def run_ours(model: HookedALM, x: ALMInput) -> DepthValues:
    """Residual stream at every depth, and logits."""
    names = model.depth_names()
    logits, cache = model.run_with_cache(x, names_filter=names, return_cache_object=False)
    depths = {f"depth {k}": cache[name].cpu() for k, name in enumerate(names)}
    return {**depths, "logits": logits.cpu()}


def compare(prompt: str, expected: DepthValues, got: DepthValues, x: ALMInput) -> list[Comparison]:
    """Compare two runs at real positions, the only ones that mean anything."""
    rows = []
    for where, theirs in expected.items():
        axes = _axes(where)
        real = x.attention_mask.bool().cpu()
        if "pos" not in axes:  # all of a memory is read
            real = torch.ones(theirs.shape[:2], dtype=torch.bool)
        a, b = theirs[real], got[where][real]
        agreement = None
        if where == "logits":
            agreement = float((a.argmax(-1) == b.argmax(-1)).float().mean())
        difference = (a.double() - b.double()).abs()
        largest = int(difference.nan_to_num(torch.inf).argmax())
        row, *units = map(int, np.unravel_index(largest, difference.shape))
        # Its row and position in the batch, from its place among real positions.
        at = [*real.nonzero()[row].tolist(), *units]
        rows.append(
            Comparison(
                prompt=prompt,
                where=where,
                max_abs_difference=float(difference.flatten()[largest]),
                is_equal=torch.equal(a, b),
                argmax_agreement=agreement,
                at=dict(zip(axes, at, strict=True)),
            )
        )
    return rows


def _axes(where: str) -> list[str]:
    if where == "logits":
        return ["batch", "pos", "vocab"]
    return (point_of(where).axes if "hook_" in where else "batch pos d_model").split()
