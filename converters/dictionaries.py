"""Sparse autoencoders in files: SAELens' folders, out and in, and dictionary_learning's ``ae.pt``.

A folder that is written here is SAELens' (``cfg.json``, ``sae_weights.safetensors``,
``sparsity.safetensors``), and has what SAELens does not know of in ``hooked_alm.json``: the
architecture in training, and whatever tells where the rows came from. SAELens calls every
dictionary with thresholds a ``jumprelu``.

Source: sae-lens 6.54.12, ``SAE.load_from_disk`` and ``save_inference_model``; dictionary-learning
0.1.0, ``trainers/`` and ``dictionary.py``.
"""

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hooked_alm.errors import ConversionError, InputError, any_failure
from hooked_alm.methods.dictionary.autoencoder import (
    Architecture,
    DictionaryConfig,
    SparseAutoencoder,
)
from hooked_alm.storage import FilePath, expanded, write_atomic
from hooked_alm.text_files import read_json

CONFIG, WEIGHTS, SPARSITY, CARD = (
    "cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "hooked_alm.json",
)  # fmt: skip
FORMAT = "hooked_alm dictionary 1"
SAELENS_VERSION = "6.54.12"
"""Whose format is written."""
DictionaryDtype = Literal["float32", "float16"]
_TRAINED_BY = {
    "AutoEncoder": "standard",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "matryoshka",
    "JumpReluAutoEncoder": "jumprelu",
}


@dataclass(frozen=True, kw_only=True)
class StoredDictionary:
    """A dictionary with what its file says of it."""

    sae: SparseAutoencoder
    point: str | None
    """Hook point whose rows it takes; None if the file does not say."""
    about: dict[str, Any] = field(default_factory=dict)
    """What else the file says: where the rows came from, how it was trained; JSON."""


# --- Out


def save_dictionary(
    sae: SparseAutoencoder,
    folder: FilePath,
    *,
    point: str,
    model: str,
    about: Mapping[str, Any] | None = None,
    frequency: Tensor | None = None,
    dtype: DictionaryDtype = "float32",
) -> None:
    """Writes a folder that SAELens loads; ``cfg.json`` comes last, so that one with it is whole.

    Args:
        sae: the dictionary, for rows in their own units.
        folder: made if it is not there.
        point: hook point of the rows.
        model: name of the model.
        about: whatever else tells what it is; JSON.
        frequency: share of rows that activate each latent, ``[latent]``; None leaves it out.
        dtype: of the weights in the file.

    Raises:
        InputError: a threshold that was never found, which SAELens would take as "all active";
            weights that the dtype does not hold.
    """
    sae.check_threshold()
    cfg, kind = sae.cfg, getattr(torch, dtype)
    tensors = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if cfg.has_threshold:
        tensors["threshold"] = sae.threshold
    stored = {name: one.detach().cpu().to(kind).contiguous() for name, one in tensors.items()}
    if bad := [name for name, one in stored.items() if not bool(one.isfinite().all())]:
        raise InputError(
            f"writing a dictionary to {folder}: got values in {', '.join(bad)} that {dtype} does "
            "not hold, expected finite ones. Write it in float32, or train it again."
        )
    of_architecture: dict[str, Any] = {"architecture": "jumprelu"}
    if cfg.architecture == "topk":
        of_architecture = {
            "architecture": "topk",
            "k": cfg.k,
            "rescale_acts_by_decoder_norm": False,
        }
    elif cfg.architecture == "standard":
        of_architecture = {"architecture": "standard"}
    settings = {
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "dtype": dtype,
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **of_architecture,
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "model_name": model,
            "hook_name": point,
            "training_architecture": cfg.architecture,
        },
    }
    card = {
        "format": FORMAT,
        "architecture": cfg.architecture,
        "k": cfg.k,
        "prefixes": [*cfg.prefixes],
        "point": point,
        "model": model,
        **(about or {}),
    }
    to = expanded(Path(folder))
    files = {WEIGHTS: save(stored)}
    if frequency is not None:
        logs = frequency.detach().cpu().double().clamp_min(1e-10).log10().float()
        files[SPARSITY] = save({"sparsity": logs})
    files |= {CARD: _json(card), CONFIG: _json(settings)}
    try:
        (to / CONFIG).unlink(missing_ok=True)
        for name, data in files.items():
            write_atomic(to / name, data)
    except OSError as error:
        raise InputError(
            f"writing a dictionary to {to}: got '{error.strerror or error}' from the system. Give "
            "a folder that can be written."
        ) from error


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"


# --- In


def load_dictionary(
    path: FilePath, *, architecture: Architecture | None = None
) -> StoredDictionary:
    """A dictionary from a folder of ours or SAELens', or from an ``ae.pt`` of dictionary_learning.

    Nothing is run that a file says. What a form of SAELens' has beside ours is folded into the
    weights: a decoder of other norms, a centre that is not taken from the rows.

    Args:
        path: a folder, or an ``ae.pt``.
        architecture: of an ``ae.pt`` without its ``config.json``, which ``topk`` and ``batchtopk``
            cannot be told apart by.

    Raises:
        ConversionError: files that are missing, damaged or of another form; an activation or a
            normalisation that this version does not have.
        InputError: a dictionary whose threshold was never found (C51).
    """
    where = expanded(Path(path))
    if where.is_dir() and not (where / CONFIG).is_file() and (where / "ae.pt").is_file():
        where = where / "ae.pt"
    found = _from_pt(where, architecture) if where.suffix == ".pt" else _from_folder(where)
    found.sae.check_threshold()
    return found


def _from_folder(folder: Path) -> StoredDictionary:
    doing = f"reading the dictionary {folder}"
    if not (folder / CONFIG).is_file():
        raise ConversionError(
            f"{doing}: got no {CONFIG}, expected a folder with it and {WEIGHTS}, or an ae.pt."
        )
    settings = read_json(folder / CONFIG)
    card = read_json(folder / CARD) if (folder / CARD).is_file() else {}
    if card and card.get("format") != FORMAT:
        raise ConversionError(f"{doing}: {CARD} is none of this version's, expected {FORMAT!r}.")
    try:
        tensors = load((folder / WEIGHTS).read_bytes())
    except (OSError, SafetensorError) as error:
        raise ConversionError(
            f"{doing}: {WEIGHTS} cannot be read ({error}). Copy the folder again."
        ) from None
    cfg = _saelens_config(doing, settings, card)
    sae = _filled(doing, cfg, {**tensors, "W_enc": _transposed(tensors.get("W_enc"))})
    with torch.no_grad():
        if settings.get("rescale_acts_by_decoder_norm"):
            sizes = sae.W_dec.norm(dim=-1)
            sae.encoder.mul_(sizes[:, None])
            sae.b_enc.mul_(sizes)
            sae.W_dec.div_(sizes[:, None])
        if not settings.get("apply_b_dec_to_input", True):
            sae.b_enc.add_(sae.encoder @ sae.b_dec)
    metadata = settings.get("metadata") or {}
    point = card.get("point") or metadata.get("hook_name")
    return StoredDictionary(sae=sae, point=point, about=card or metadata)


def _saelens_config(
    doing: str, settings: Mapping[str, Any], card: Mapping[str, Any]
) -> DictionaryConfig:
    kinds: dict[str, Architecture]
    kinds = {"topk": "topk", "jumprelu": "jumprelu", "standard": "standard"}
    plain = {
        "normalize_activations": ("none", None),
        "reshape_activations": ("none", "hook_z", None),
    }
    faults = [
        f"{name}={settings.get(name)!r}" for name, good in plain.items()
        if settings.get(name) not in good
    ]  # fmt: skip
    if settings.get("architecture") not in kinds:
        faults.append(f"architecture={settings.get('architecture')!r}")
    if faults:
        raise ConversionError(
            f"{doing}: got {', '.join(faults)} in {CONFIG}, expected one of {', '.join(kinds)} for "
            "rows as they are. Fold its normalisation into the weights with SAELens first "
            "(`sae.fold_activation_norm_scaling_factor`)."
        )
    with any_failure(ConversionError, f"{doing}: {CONFIG} or {CARD} is damaged", "Copy it again."):
        return DictionaryConfig(
            d_in=settings["d_in"],
            d_sae=settings["d_sae"],
            architecture=card.get("architecture", kinds[settings["architecture"]]),
            k=card.get("k", settings.get("k")),
            prefixes=tuple(card.get("prefixes", ())),
        )


def _from_pt(path: Path, architecture: Architecture | None) -> StoredDictionary:
    doing = f"reading the dictionary {path}"
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ConversionError(
            f"{doing}: it cannot be read ({error!s:.200}). Copy it again."
        ) from None
    beside = path.with_name("config.json")
    trainer = (read_json(beside).get("trainer") or {}) if beside.is_file() else {}
    kind = architecture or _TRAINED_BY.get(trainer.get("dict_class", ""))
    if isinstance(tensors, dict) and "group_sizes" in tensors:
        kind = "matryoshka"
    if not isinstance(tensors, dict) or kind not in get_args(Architecture):
        raise ConversionError(
            f"{doing}: got no config.json beside it that says what it is, expected a dict_class of "
            f"{', '.join(_TRAINED_BY)}. Give architecture='batchtopk' (AudioSAE's are), or what it "
            "is."
        )
    renamed = dict(tensors)
    if "encoder.weight" in tensors:
        renamed["W_enc"] = tensors["encoder.weight"]
        renamed["b_enc"] = tensors.get("encoder.bias")
        renamed["W_dec"] = _transposed(tensors.get("decoder.weight"))
        renamed.setdefault("b_dec", tensors.get("bias"))  # as its AutoEncoder has it
    else:
        renamed["W_enc"] = _transposed(tensors.get("W_enc"))
    encoder = renamed["W_enc"]
    if encoder is None or encoder.ndim != 2:
        raise ConversionError(
            f"{doing}: got no encoder in it, expected dictionary_learning's names. "
            "Give an ae.pt of one of its trainers, or a folder of SAELens."
        )
    d_sae, d_in = encoder.shape
    with any_failure(ConversionError, f"{doing}: its numbers are damaged", "Copy it again."):
        groups = tensors.get("group_sizes", torch.zeros(0, dtype=torch.long))
        cfg = DictionaryConfig(
            d_in=d_in,
            d_sae=d_sae,
            architecture=kind,  # type: ignore[arg-type]
            k=int(tensors["k"]) if "k" in tensors else None,
            prefixes=tuple(groups.cumsum(0).tolist()),
        )
    if cfg.has_threshold:
        renamed["threshold"] = tensors.get("threshold", torch.tensor(-1.0)).expand(d_sae)
    sae = _filled(doing, cfg, renamed)
    if kind == "jumprelu":  # whose encoder takes rows as they are
        with torch.no_grad():
            sae.b_enc.add_(sae.encoder @ sae.b_dec)
    return StoredDictionary(sae=sae, point=None, about={"trainer": trainer})


def _transposed(value: Tensor | None) -> Tensor | None:
    return value.T if value is not None and value.ndim == 2 else value


def _filled(doing: str, cfg: DictionaryConfig, tensors: Mapping[str, Any]) -> SparseAutoencoder:
    """A dictionary with the tensors of a file, the encoder with a latent to a row."""
    sae = SparseAutoencoder(cfg)
    faults = []
    names = ["W_dec", "W_enc", "b_dec", "b_enc", *(["threshold"] if cfg.has_threshold else [])]
    for name in names:
        own: Tensor = sae.encoder if name == "W_enc" else getattr(sae, name)
        value = tensors.get(name)
        if not isinstance(value, Tensor) or value.shape != own.shape:
            came = "nothing" if value is None else list(getattr(value, "shape", []))
            faults.append(f"{name} {came}, expected {list(own.shape)}")
        elif not bool(value.isfinite().all()):
            faults.append(f"{name} with values that are not finite")
        else:
            with torch.no_grad():
                own.copy_(value)
    if faults:
        raise ConversionError(f"{doing}: got {'; '.join(faults)}. It is damaged; copy it again.")
    return sae
