"""What peers computed of dictionaries: files that scripts/dictionary_peers.py made once."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from hooked_alm.methods.dictionary.autoencoder import (
    Architecture,
    DictionaryConfig,
    SparseAutoencoder,
)

FILES = Path(__file__).resolve().parents[1] / "methods" / "dictionary" / "peers"
K, PREFIXES, BANDWIDTH = 4, (8, 20, 40), 0.3
"""As in scripts/dictionary_peers.py."""


def peer_numbers(peer: str, architecture: str) -> dict[str, Tensor]:
    """Tensors of a file, by name."""
    with safe_open(FILES / f"{peer}_{architecture}.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def peer_dictionary(architecture: Architecture, given: dict[str, Tensor]) -> SparseAutoencoder:
    """The dictionary with a file's weights."""
    d_in, d_sae = given["W_enc"].shape
    prefixes = PREFIXES if architecture == "matryoshka" else ()
    cfg = DictionaryConfig(
        d_in=d_in, d_sae=d_sae, architecture=architecture, k=K, prefixes=prefixes
    )
    sae = SparseAutoencoder(cfg)
    with torch.no_grad():
        sae.encoder.copy_(given["W_enc"].T)
        for name in ("b_enc", "W_dec", "b_dec", "threshold"):
            getattr(sae, name).copy_(given[name])
    return sae
