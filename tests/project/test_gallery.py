"""Every script of the gallery runs as it stands, and what it prints is what Hugging Face says."""

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from transformers import Qwen2AudioForConditionalGeneration

from hooked_alm import ALMInput
from hooked_alm.bundled import model_folder
from tolerances import ATTENTION_MASS, DIRECT_PATH, LENS_ROWS

GALLERY = Path(__file__).parents[2] / "docs" / "gallery"
SCRIPTS = sorted(GALLERY.glob("*.py"))
N_HEADS, D_HEAD = 6, 16
"""Of the bundled models."""

Variables = dict[str, Any]
Change = Callable[[Tensor], Tensor]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[Variables, str]]:
    """A script run from another folder without an argument: its variables and what it printed."""

    def run(name: str) -> tuple[Variables, str]:
        monkeypatch.setattr(sys, "argv", [str(GALLERY / f"{name}.py")])
        monkeypatch.chdir(tmp_path)
        mpl.use("Agg")
        try:
            variables = runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            plt.close("all")
        picture = plt.imread(tmp_path / f"{name}.png")
        assert min(picture.shape[:2]) > 300
        assert picture.std() > 0.05, "an empty picture"
        assert torch.is_grad_enabled()
        return variables, capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def hf() -> Qwen2AudioForConditionalGeneration:
    folder = model_folder("bundled:follows_text")
    return Qwen2AudioForConditionalGeneration.from_pretrained(folder).eval()


def hf_run(
    hf: Any, x: ALMInput, changed: nn.Module | None = None, change: Change = lambda value: value
) -> Any:
    """One forward, the input of a module changed on the way."""
    frames = torch.arange(x.clips[0].features.shape[-1])
    arguments = {
        "input_ids": x.tokens,
        "attention_mask": x.attention_mask,
        "position_ids": x.position_ids,
        "input_features": torch.cat([clip.features for clip in x.clips]),
        "feature_attention_mask": torch.stack([frames < c.n_frames[0] for c in x.clips]).long(),
    }
    handles = []
    if changed is not None:
        hook = lambda module, args: (change(args[0].clone()), *args[1:])  # noqa: E731
        handles.append(changed.register_forward_pre_hook(hook))
    try:
        with torch.no_grad():
            return hf(**arguments, output_attentions=True, output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()


def hf_z(hf: Any, x: ALMInput, layer: int) -> Tensor:
    """``[batch, pos, head * d_head]``: what the output projection of a layer reads."""
    found: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        found.append(value)
        return value

    hf_run(hf, x, attention(hf, layer).o_proj, keep)
    return found[0]


def attention(hf: Any, layer: int) -> Any:
    return hf.model.language_model.layers[layer].self_attn


def columns(head: int) -> slice:
    return slice(head * D_HEAD, (head + 1) * D_HEAD)


def test_the_scripts_are_short_and_listed() -> None:
    assert len(SCRIPTS) == 5
    for script in SCRIPTS:
        assert len(script.read_text("utf-8").splitlines()) < 40, script.name
    listed = re.findall(r"^- `(\w+\.py)`", (GALLERY / "README.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == [script.name for script in SCRIPTS]


def test_attention_pattern(run: Any) -> None:
    found, out = run("attention_pattern")
    # sdpa has no pattern, so this one comes from Hugging Face's other kernel.
    eager = Qwen2AudioForConditionalGeneration.from_pretrained(
        model_folder("bundled:follows_text"), attn_implementation="eager"
    ).eval()
    expected = hf_run(eager, found["x"]).attentions[found["LAYER"]][0, found["HEAD"]]
    torch.testing.assert_close(found["pattern"], expected, atol=ATTENTION_MASS, rtol=0)
    placeholder = found["model"].audio.tokens.placeholder
    heard = float(expected[-1, found["x"].tokens[0] == placeholder].sum())
    assert heard > 0.5
    assert f"audio {heard:.1%}" in out
    assert sum(found["shares"].values()) == pytest.approx(1, abs=ATTENTION_MASS)


def test_ablate_head(run: Any, hf: Any) -> None:
    found, out = run("ablate_head")
    tokenizer, effect = found["model"].tokenizer, found["effect"]
    cheerful, sad = (tokenizer.encode(word)[0] for word in ("cheerful", "sad"))
    before = hf_run(hf, found["x"]).logits[0, -1]
    for layer, head in ((found["layer"], found["head"]), (3, 0), (9, 5)):

        def zero(z: Tensor, head: int = head) -> Tensor:
            z[..., columns(head)] = 0
            return z

        logits = hf_run(hf, found["x"], attention(hf, layer).o_proj, zero).logits[0, -1]
        change = logits - before
        assert torch.equal(effect[layer, head], change[cheerful] - change[sad])
    assert float(effect.abs().max()) == abs(float(effect[found["layer"], found["head"]])) > 1
    assert f"{effect[found['layer'], found['head']]:+.2f} logits" in out


def test_patch_head(run: Any, hf: Any) -> None:
    found, out = run("patch_head")
    base, donor = found["cheerful"], found["sad"]
    metric = found["sadness"]
    clean, other = (metric(hf_run(hf, x).logits) for x in (base, donor))
    assert clean < 0 < other
    for layer, head in ((found["layer"], found["head"]), (2, 4), (8, 1)):
        z = hf_z(hf, donor, layer)

        def patch(value: Tensor, head: int = head, z: Tensor = z) -> Tensor:
            value[..., columns(head)] = z[..., columns(head)]
            return value

        patched = metric(hf_run(hf, base, attention(hf, layer).o_proj, patch).logits)
        assert torch.equal(found["share"][layer, head], (patched - clean) / (other - clean))
    assert f"From {clean:.2f} to {other:.2f}" in out
    assert f"{found['share'].max():.1%}" in out


def test_attribute_logit(run: Any, hf: Any) -> None:
    found, out = run("attribute_logit")
    tokenizer = found["model"].tokenizer
    sad, cheerful = (tokenizer.encode(word)[0] for word in ("sad", "cheerful"))
    logits = hf_run(hf, found["x"]).logits[0, -1]
    difference = float(logits[sad] - logits[cheerful])
    assert f"at the readout: {difference:.3f}" in out
    assert sum(found["shares"].values()) == pytest.approx(difference, abs=LENS_ROWS)
    # One component's share: what it wrote, through the final norm's scale to the two logits.
    stream: list[Tensor] = []
    hf_run(hf, found["x"], hf.model.language_model.norm, lambda v: stream.append(v) or v)
    norm = hf.model.language_model.norm
    rms = (stream[0][0, -1].pow(2).mean() + norm.variance_epsilon).sqrt()
    direction = norm.weight * (hf.lm_head.weight[sad] - hf.lm_head.weight[cheerful])
    with torch.no_grad():
        written = attention(hf, 2).o_proj(hf_z(hf, found["x"], 2))[0, -1]
        share = float(written / rms @ direction)
    assert found["shares"]["2_attn_out"] == pytest.approx(share, abs=LENS_ROWS)
    assert found["largest"] == "2_attn_out"


def test_patch_path(run: Any, hf: Any) -> None:
    found, out = run("patch_path")
    layer, head = found["SENDER"]
    base, metric, effect = found["base"], found["metric"], found["effect"]
    zs = [hf_z(hf, x, layer)[..., columns(head)] for x in (found["clean"], base)]
    written = (zs[0] - zs[1]) @ attention(hf, layer).o_proj.weight[:, columns(head)].T
    unpatched = hf_run(hf, base)
    for reader, reader_head in ((found["layer"], found["head"]), (3, 5), (5, 2)):
        block = hf.model.language_model.layers[reader]
        with torch.no_grad():
            edited = block.input_layernorm(unpatched.hidden_states[reader] + written)
            query = attention(hf, reader).q_proj(edited)[..., columns(reader_head)]

        def hook(_: Any, __: Any, out: Tensor, q: Tensor = query, h: int = reader_head) -> Tensor:
            out = out.clone()
            out[..., columns(h)] = q
            return out

        handle = attention(hf, reader).q_proj.register_forward_hook(hook)
        change = float(metric(hf_run(hf, base).logits) - metric(unpatched.logits))
        handle.remove()
        assert float(effect[reader, reader_head]) == pytest.approx(change, abs=DIRECT_PATH)
        assert abs(change) > 20 * DIRECT_PATH
    assert not effect[: layer + 1].any()
    assert f"{effect[found['layer'], found['head']]:+.3f} logits" in out


def test_a_picture_goes_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = GALLERY / "attribute_logit.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "shares.png")])
    mpl.use("Agg")
    runpy.run_path(str(script), run_name="__main__")
    plt.close("all")
    assert (tmp_path / "shares.png").stat().st_size > 1000
