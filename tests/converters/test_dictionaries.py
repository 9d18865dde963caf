"""Dictionaries in files: SAELens' and dictionary_learning's, as these wrote them; and ours."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hooked_alm.converters.dictionaries import load_dictionary, save_dictionary
from hooked_alm.errors import ConversionError, HookedALMError, InputError
from hooked_alm.methods.dictionary.autoencoder import Architecture, SparseAutoencoder
from peer_dictionaries import FILES, PREFIXES, K, peer_dictionary, peer_numbers
from tolerances import PEER_DICTIONARY

ARCHITECTURES: tuple[Architecture, ...] = ("topk", "batchtopk", "matryoshka", "jumprelu")


def dictionary(architecture: Architecture) -> SparseAutoencoder:
    return peer_dictionary(architecture, peer_numbers("saelens", architecture))


def saved(architecture: Architecture, folder: Path, **settings: Any) -> Path:
    where = {"point": "blocks.1.hook_resid_post", "model": "tiny"}
    save_dictionary(dictionary(architecture), folder, **where, **settings)
    return folder


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_folders_that_saelens_wrote(architecture: Architecture) -> None:
    given = peer_numbers("saelens", architecture)
    found = load_dictionary(FILES / f"saelens_{architecture}")
    assert found.sae.cfg.architecture == architecture
    assert found.about["sae_lens_version"] == "6.54.12"
    made = found.sae(given["rows"])
    torch.testing.assert_close(
        made, given["reconstruction"], rtol=PEER_DICTIONARY, atol=PEER_DICTIONARY
    )


def test_what_saelens_has_beside_ours_is_folded(tmp_path: Path) -> None:
    """Decoder rows of other norms, and an encoder that takes rows as they are."""
    given = peer_numbers("saelens", "topk")
    shutil.copytree(FILES / "saelens_topk", folder := tmp_path / "one")
    tensors = load_file(folder / "sae_weights.safetensors")
    sizes = 1 + torch.rand(40, generator=torch.Generator().manual_seed(1))
    tensors["W_dec"] = tensors["W_dec"] * sizes[:, None]
    save_file(tensors, folder / "sae_weights.safetensors")
    settings = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(settings | {"apply_b_dec_to_input": False}))
    x = given["rows"]
    pre = (x @ tensors["W_enc"] + tensors["b_enc"]) * sizes
    kept = pre.topk(K, dim=-1).indices
    features = torch.zeros_like(pre).scatter(1, kept, pre.gather(1, kept).relu())
    expected = (features / sizes) @ tensors["W_dec"] + tensors["b_dec"]
    torch.testing.assert_close(load_dictionary(folder).sae(x), expected, rtol=0, atol=1e-5)


def test_files_of_dictionary_learning(tmp_path: Path) -> None:
    given = peer_numbers("dictionary_learning", "batchtopk")
    found = load_dictionary(FILES / "ae.pt", architecture="batchtopk").sae
    assert (found.cfg.architecture, found.cfg.k) == ("batchtopk", K)
    assert (found.threshold == 1.25).all()
    torch.testing.assert_close(
        found(given["rows"]), given["in_use"], rtol=PEER_DICTIONARY, atol=PEER_DICTIONARY
    )
    shutil.copy(FILES / "ae.pt", tmp_path)
    with pytest.raises(ConversionError, match=r"no config\.json beside it.*'batchtopk'"):
        load_dictionary(tmp_path)
    (tmp_path / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoderTopK"}}')
    assert load_dictionary(tmp_path).sae.cfg.architecture == "topk"


def test_a_plain_relu_with_a_penalty(tmp_path: Path) -> None:
    """SAELens' ``standard`` and dictionary_learning's ``AutoEncoder``, and ours as the former."""
    draw = torch.Generator().manual_seed(4)
    w_enc, w_dec, x = (torch.randn(*shape, generator=draw) for shape in ((5, 9), (9, 5), (7, 5)))
    b_enc, b_dec = torch.randn(9, generator=draw), torch.randn(5, generator=draw)
    made = ((x - b_dec) @ w_enc + b_enc).relu() @ w_dec + b_dec
    theirs = {
        "encoder.weight": w_enc.T, "encoder.bias": b_enc, "decoder.weight": w_dec.T, "bias": b_dec
    }  # fmt: skip
    torch.save(theirs, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoder"}}')
    read = load_dictionary(tmp_path).sae
    torch.testing.assert_close(read(x), made)
    save_dictionary(read, folder := tmp_path / "ours", point="p", model="m")
    assert json.loads((folder / "cfg.json").read_text())["architecture"] == "standard"
    assert {*load_file(folder / "sae_weights.safetensors")} == {"W_enc", "W_dec", "b_enc", "b_dec"}
    (folder / "hooked_alm.json").unlink()  # as SAELens would have written it
    again = load_dictionary(folder).sae
    assert again.cfg == read.cfg
    assert torch.equal(again(x), read(x))


def test_a_threshold_that_was_never_found_is_refused(tmp_path: Path) -> None:
    """C51: SAELens and dictionary_learning would take everything as active."""
    with pytest.raises(InputError, match="negative or was never found"):
        load_dictionary(FILES / "untrained_ae.pt", architecture="batchtopk")
    sae = dictionary("batchtopk")
    sae.threshold.fill_(torch.nan)
    with pytest.raises(InputError, match="negative or was never found"):
        save_dictionary(sae, tmp_path / "new", point="p", model="m")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_written_comes_back(architecture: Architecture, tmp_path: Path) -> None:
    folder = saved(architecture, tmp_path / "a", about={"seed": 3}, frequency=torch.ones(40) / 2)
    found, own = load_dictionary(folder), dictionary(architecture)
    assert found.sae.cfg == own.cfg
    if architecture == "matryoshka":
        assert found.sae.cfg.prefixes == PREFIXES
    assert found.point == "blocks.1.hook_resid_post"
    assert found.about["seed"] == 3
    rows = peer_numbers("saelens", architecture)["rows"]
    assert torch.equal(found.sae(rows), own(rows))
    sparsity = load_file(folder / "sparsity.safetensors")["sparsity"]
    assert sparsity.tolist() == pytest.approx([-0.30103] * 40)


def test_saelens_reads_thresholds_as_jumprelu(tmp_path: Path) -> None:
    """The fields of ``cfg.json`` are those that SAELens itself wrote, for one with thresholds."""
    folder = saved("batchtopk", tmp_path / "a")
    ours = json.loads((folder / "cfg.json").read_text())
    theirs = json.loads((FILES / "saelens_jumprelu" / "cfg.json").read_text())
    assert ours.keys() == theirs.keys()
    assert {k: v for k, v in ours.items() if k != "metadata"} == {
        k: v for k, v in theirs.items() if k != "metadata"
    }
    mine, other = (
        load_file(one / "sae_weights.safetensors") for one in (folder, FILES / "saelens_jumprelu")
    )
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in other.items()}


def test_half_precision(tmp_path: Path) -> None:
    folder = saved("topk", tmp_path / "a", dtype="float16")
    found = load_dictionary(folder).sae
    assert torch.equal(found.W_dec, dictionary("topk").W_dec.half().float())
    sae = dictionary("topk")
    sae.b_dec[3] = 1e6
    with pytest.raises(InputError, match="values in b_dec that float16 does not hold"):
        save_dictionary(sae, tmp_path / "b", point="p", model="m", dtype="float16")


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def changed(name: str, **fields: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        found = json.loads((folder / name).read_text()) | fields
        (folder / name).write_text(json.dumps(found))

    return change


def with_tensor(name: str, value: torch.Tensor) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        found = load_file(folder / "sae_weights.safetensors") | {name: value}
        save_file(found, folder / "sae_weights.safetensors")

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("cfg.json"), "got no cfg.json"),
        (without("sae_weights.safetensors"), "sae_weights.safetensors cannot be read"),
        (changed("cfg.json", architecture="gated"), "architecture='gated'"),
        (changed("cfg.json", normalize_activations="layer_norm"), "Fold its normalisation"),
        (changed("cfg.json", d_sae=41), r"W_dec \[40, 12\], expected \[41, 12\]"),
        (changed("hooked_alm.json", format="other"), "none of this version's"),
        (changed("hooked_alm.json", prefixes=[3]), "of topk, which has none"),
        (with_tensor("b_dec", torch.full((12,), torch.nan)), "b_dec with values that are not"),
        (lambda f: (f / "sae_weights.safetensors").write_bytes(b"none"), "cannot be read"),
    ],
)
def test_damage(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    folder = saved("topk", tmp_path / "a")
    damage(folder)
    with pytest.raises(HookedALMError, match=message):
        load_dictionary(folder)
