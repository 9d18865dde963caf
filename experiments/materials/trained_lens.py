"""A trained lens on disk: ``params.safetensors`` and ``config.json`` in a folder."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.errors import InputError
from hooked_alm.methods.reading.lens import Lens, LensNorm, LogitLens
from hooked_alm.methods.reading.tuned_lens import TunedLens
from hooked_alm.offload import home_of

from ..workbench.files import OwnFiles
from ..workbench.identity import file_sha256, to_json

PARAMS, CONFIG = "params.safetensors", "config.json"
Scored = Literal["all", "without_audio", "readout"]
"""Positions that the loss of a lens counts."""


class LensCard(BaseModel):
    """``config.json``: which model a lens belongs to, and how it was trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = Field(default=1, ge=1, le=1)
    model: str
    revision: str | None = None
    architecture: str | None = None
    weights_sha256: str | None = None
    dtype: str
    n_layers: int = Field(ge=1)
    d_model: int = Field(ge=1)
    unembed_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Hash of final norm and unembedding, by which a model is recognised."""
    scored: Scored
    """Positions that the loss counted."""
    training: dict[str, Any] = Field(default_factory=dict)


def save_lens(lens: TunedLens, card: LensCard, folder: Path) -> None:
    """Write a lens; ``config.json`` comes last, so that a folder with one is whole."""
    files = OwnFiles(folder)
    files.write(PARAMS, lens_bytes(lens))
    files.write(CONFIG, to_json(card.model_dump(), indent=1) + "\n")


def lens_bytes(lens: TunedLens) -> bytes:
    """What ``params.safetensors`` of a lens holds."""
    return save({name: one.cpu().contiguous() for name, one in lens.state_dict().items()})


def load_lens(folder: str | Path, model: HookedALM) -> TunedLens:
    """A lens, checked against the model it is to be used on, and on its device.

    Raises:
        InputError: a missing or damaged file, fields or tensors that are not a lens', or a lens of
            another model.
    """
    folder = Path(folder)
    card = read_card(folder)
    lens = TunedLens(card.n_layers, card.d_model, unembed_sha256=card.unembed_sha256)
    tensors = read_tensors(folder / PARAMS, "copy the lens again, or train it again")
    expected = {name: tuple(tensor.shape) for name, tensor in lens.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        wrong = sorted(k for k in found | expected if found.get(k) != expected.get(k))
        raise InputError(
            f"reading {folder / PARAMS}: got {len(wrong)} tensors that do not fit {CONFIG} "
            f"({wrong[0]}: {found.get(wrong[0], 'missing')}, expected "
            f"{expected.get(wrong[0], 'none')}). Copy both files again."
        )
    if bad := sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all()):
        raise InputError(
            f"reading {folder / PARAMS}: got NaN or infinite values in {', '.join(bad[:3])}, "
            "expected finite ones. Train the lens again, with a lower learning rate."
        )
    lens.load_state_dict(tensors)
    lens.check(model)
    return lens.to(home_of(model.head_unembed))


def read_card(folder: Path) -> LensCard:
    """The ``config.json`` of a lens.

    Raises:
        InputError: no such file, no JSON, or wrong fields.
    """
    path = folder / CONFIG
    try:
        found = json.loads(path.read_text("utf-8"))
        return LensCard.model_validate(found)
    except OSError:
        hint = (
            f" Give its lens folder: {folder / 'lens'}."
            if (folder / "lens" / CONFIG).is_file()
            else " `hooked-alm run tuned_lens` makes one."
        )
        raise InputError(
            f"reading the tuned lens {folder}: got no {CONFIG}, expected a folder with it and "
            f"{PARAMS}.{hint}"
        ) from None
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'all'}: {item['msg']}"
            for item in error.errors(include_url=False)
        )
        raise InputError(
            f"reading {path}: got fields that are no tuned lens' ({faults}). Copy it again."
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"reading {path}: got a damaged file ({error}), expected JSON. Copy it again."
        ) from None


def open_lens(folder: str | None, model: HookedALM, norm: LensNorm = "final") -> Lens:
    """The lens that a setting names: a trained one, or with None the logit lens.

    Raises:
        InputError: see `load_lens`.
    """
    return LogitLens(norm) if folder is None else load_lens(folder, model)


def described_lens(folder: str | None) -> dict[str, Any]:
    """What identifies a trained lens, for ``inputs``: its card and the hash of its parameters."""
    if folder is None:
        return {}
    card = read_card(Path(folder)).model_dump()
    return {"tuned_lens": {**card, "params_sha256": file_sha256(Path(folder) / PARAMS)}}


def lens_name(folder: str | None) -> str:
    """What a page calls the lens that a setting names."""
    return "logit lens" if folder is None else f"tuned lens {folder}"


def read_tensors(path: Path, cure: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        InputError: no such file, or a damaged one; ``cure`` says what to do.
    """
    try:
        return load(path.read_bytes())
    except OSError as error:
        came = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise InputError(
            f"reading {path}: got {came}, expected tensors. To go on, {cure}."
        ) from None
    except SafetensorError as error:
        raise InputError(
            f"reading {path}: got a damaged file ({error}), expected safetensors. To go on, {cure}."
        ) from None


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """All of them in one file, or on a kill none."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    OwnFiles(path.parent).write(path.name, save(plain))
