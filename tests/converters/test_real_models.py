"""Trained weights, in the folders that ``scripts/real_models.py`` makes (``HOOKED_ALM_REAL``)."""

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from hooked_alm import HookedALM
from hooked_alm.converters.parity import compare_with_hf
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.reading.stream_norms import StreamNorms, stream_norms
from hooked_alm.methods.statistics.similarity import linear_cka

pytestmark = pytest.mark.checkpoint
TINY, BASE = "whisper-tiny.en", "whisper-base"
DTYPES, KERNELS = [torch.float32, torch.bfloat16], ["sdpa", "eager"]
NORMS = {
    (BASE, "tone"): [517.94, 510.16, 565.27, 2378.74, 2681.85, 3232.99],  # those on record
    (BASE, "silence"): [523.02, 513.23, 573.50, 2530.62, 2831.65, 3382.36],
    (BASE, "sample"): [446.95, 460.61, 513.93, 2437.16, 2669.57, 3151.60],
    (TINY, "tone"): [512.41, 552.20, 676.04, 3790.53],
    (TINY, "silence"): [531.93, 552.03, 671.34, 3571.74],
    (TINY, "sample"): [423.59, 421.70, 590.42, 3572.53],
}
"""Norms of the encoder's stream behind each block, of all its rows."""
MASSIVE = {  # rows behind block 4; norms without those, block by block; share of the squared norm
    "tone": (54, [509.4, 500.2, 531.4, 629.1, 1231.6, 1993.3], 0.930),
    "sample": (34, [440.2, 452.4, 484.9, 617.6, 1115.6, 1855.0], 0.936),
}
CKA = {  # the plain estimator, the debiased one; depths 0 to L - 1
    (BASE, "sample"): ([0.073, 0.106, 0.194, 0.827, 0.964, 0.983],
                       [0.069, 0.103, 0.191, 0.826, 0.963, 0.983]),
    (BASE, "tone"): ([0.845, 0.556, 0.552, 0.655, 0.813, 0.948],
                     [0.849, 0.536, 0.532, 0.650, 0.822, 0.949]),
    (TINY, "sample"): ([0.031, 0.044, 0.100, 0.128], [0.028, 0.041, 0.097, 0.125]),
}  # fmt: skip
"""Similarity to the final state over the rows of the clip."""
SAID = {
    TINY: " Hello. Hello. Hello. Hello. Hello. I didn't know you were there. I needed to design. I "
    "thought, you know, I heard a beat. This is Diane in New Jersey. And I'm Sheila and Texas, "
    "originally from Chicago.",
    BASE: " Hello. Hello. Oh, hello. I didn't know you were there. I needed to die. Okay, I "
    "thought, you know, I heard a beep. This is Diane in New Jersey. And I'm Sheila and Texas "
    "originally from Chicago.",
}
"""Transcripts of the cut."""
LENS = {
    TINY: [", you" * 8, " ...", " ...", " Yes"],
    BASE: [" B", " to" + " a" * 15, " A" * 16, " I am",
           " I'm going to" + " go ahead and" * 4, " Hello" + " hello" * 15],
}  # fmt: skip
"""What the decoder makes of it from the depths before the last, in 16 tokens."""


class Trained:
    """Clips, and the models in float32, each made once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        t = np.linspace(0, 3, 48000)  # as on record
        tone = 0.5 * np.sin(2 * np.pi * 440 * t) + 0.3 * np.sin(2 * np.pi * 880 * t)
        sample, rate = soundfile.read(root / "telephone" / "sample.wav", dtype="float32")
        assert rate == 16000
        self.clips = {
            "tone": tone.astype(np.float32),
            "silence": np.zeros(16000, np.float32),
            "sample": sample,
            "cut": sample[104000:288000],  # 6.5 to 18 s
            "twice": np.tile(sample, 2),
            "cut thrice": np.tile(sample[104000:288000], 3),
        }
        self.made: dict[tuple[str, ...], Any] = {}

    def hooked(self, name: str) -> HookedALM:
        load = partial(HookedALM.from_pretrained, self.root / name, dtype="float32")
        return self._once(("ours", name), load)

    def hf(self, name: str) -> Any:
        made = WhisperForConditionalGeneration
        load = partial(made.from_pretrained, self.root / name, dtype=torch.float32)
        return self._once(("theirs", name), lambda: load().eval())

    def prepared(self, name: str, clip: str, **options: Any) -> ALMInput:
        return self.hooked(name).prepare(self.clips[clip], **language(name), **options)

    def heard(self, name: str, clip: str) -> tuple[StreamNorms, list[Tensor], slice]:
        """Norms, states ``[row, d_audio]`` at every depth of the encoder, and the clip's rows."""

        def hear() -> tuple[StreamNorms, list[Tensor], slice]:
            model, x = self.hooked(name).towards("encoder"), self.prepared(name, clip)
            _, cache = model.run_with_cache(x, names_filter=model.depth_names())
            [[span]] = model.encoder_rows(x).prompts.spans["audio"]
            states = [cache[point][0] for point in model.depth_names()]
            return stream_norms(model, x), states, slice(*span)

        return self._once(("heard", name, clip), hear)

    def _once(self, key: tuple[str, ...], make: Callable[[], Any]) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


@pytest.fixture(scope="module")
def trained() -> Trained:
    folder = os.environ.get("HOOKED_ALM_REAL")
    if folder is None:
        pytest.skip("HOOKED_ALM_REAL names no folder that scripts/real_models.py has filled")
    return Trained(Path(folder))


def language(name: str) -> dict[str, str]:
    """What the prompt of a multilingual one has to say."""
    return {"language": "en"} if name == BASE else {}


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_smollm2(trained: Trained, dtype: torch.dtype) -> None:
    """Logits and streams are Hugging Face's, and it knows the capital of France."""
    folder = trained.root / "smollm2-135m-instruct"
    model = HookedALM.from_pretrained(folder, dtype=dtype)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    theirs = hf(ids, output_hidden_states=True)
    ours, cache = model.run_with_cache(ids, names_filter=model.depth_names())
    assert torch.equal(ours, theirs.logits)
    for name, state in zip(model.depth_names()[:-1], theirs.hidden_states[:-1], strict=True):
        assert torch.equal(cache[name], state)
    assert "Paris" in model.generate(ids, max_new_tokens=12)[0]


@pytest.mark.parametrize("name", [TINY, BASE])
@pytest.mark.parametrize("attention", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_both_stacks(trained: Trained, name: str, attention: str, dtype: torch.dtype) -> None:
    """Both streams, the memory and the logits, on two people on the telephone."""
    folder = trained.root / name
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    model = HookedALM.from_pretrained(folder, **options)
    hf = WhisperForConditionalGeneration.from_pretrained(folder, **options).eval()
    assert hf.dtype == model.cfg.dtype == dtype
    said = " Hello. Hello. Oh, hello. I didn't know"
    x = model.prepare(trained.clips["sample"], answer_prefix=said, **language(name))
    assert 10 <= x.shape[1] <= 20
    features = WhisperFeatureExtractor.from_pretrained(folder)(
        trained.clips["sample"], sampling_rate=16000, return_tensors="pt"
    )["input_features"]
    assert torch.equal(x.clips[0].features, features)
    found = compare_with_hf(model, hf, x)
    assert found.is_equal, found.first
    assert {*model.depth_names(), "logits"} <= {row.where for row in found.rows}
    theirs = hf.get_encoder()(features.to(dtype), output_hidden_states=True)
    points = model.towards("encoder").depth_names()
    _, cache = model.run_with_cache(x, names_filter=[*points, "hook_audio_embed"])
    assert torch.equal(cache["hook_audio_embed"], theirs.last_hidden_state)
    # Their last is behind the norm.
    for point, state in zip(points[:-1], theirs.hidden_states[:-1], strict=True):
        assert torch.equal(cache[point], state), point


SHORT: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "max_new_tokens": 40},
    "fallen back": {
        "temperature": (0.0, 0.4, 0.8), "logprob_threshold": -0.1,
        "compression_ratio_threshold": 1.35, "no_speech_threshold": 0.6, "max_new_tokens": 20,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", [TINY, BASE])
@pytest.mark.filterwarnings("ignore")
def test_generation(trained: Trained, name: str) -> None:
    """Tokens are Hugging Face's, in one way or another."""
    model, hf, x = trained.hooked(name), trained.hf(name), trained.prepared(name, "sample")
    found = {}
    for way, options in SHORT.items():
        if way == "fallen back" and name == BASE:  # once is enough for the time it takes
            continue
        torch.manual_seed(3)
        expected = hf.generate(x.clips[0].features, **language(name), **options)
        torch.manual_seed(3)
        found[way] = model.generate(x, return_type="tokens", **options)
        assert torch.equal(found[way], expected), way
    # Not what the greedy one begins with: beams were weighed, and tokens sampled.
    greedy = found.pop("greedy")
    for way, tokens in found.items():
        assert not torch.equal(tokens, greedy[:, : tokens.shape[1]]), way


@pytest.mark.parametrize(("name", "clip", "n_frames"), [(TINY, "twice", 6000),
                                                        (BASE, "cut thrice", 3450)])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_long_recordings(trained: Trained, name: str, clip: str, n_frames: int) -> None:
    """What is behind the first window is heard, too, and the tokens are Hugging Face's."""
    options: dict[str, Any] = {
        "temperature": 0.0, "condition_on_prev_tokens": True, "max_new_tokens": 120,
        "return_segments": True,
    }  # fmt: skip
    x = trained.prepared(name, clip, long_form=True)
    assert x.clips[0].features.shape[-1] == n_frames
    expected = trained.hf(name).generate(
        x.clips[0].features, **language(name), return_timestamps=True, **options
    )
    found = trained.hooked(name).generate(x, return_type="tokens", **options)
    assert torch.equal(found["sequences"], expected["sequences"])
    assert float(found["segments"][0][-1]["end"]) > 30


@torch.no_grad()
def test_the_language(trained: Trained) -> None:
    x = trained.hooked(BASE).prepare(trained.clips["sample"])
    assert trained.hooked(BASE).tokenizer.decode(x.tokens[0, 1]) == "<|en|>"
    assert torch.equal(trained.hf(BASE).detect_language(x.clips[0].features), x.tokens[0, 1:2])


@pytest.mark.parametrize(("name", "clip"), NORMS)
@pytest.mark.filterwarnings("ignore:.*silent")
def test_norms(trained: Trained, name: str, clip: str) -> None:
    found = trained.heard(name, clip)[0].total()[1:, 0]
    np.testing.assert_allclose(found, NORMS[name, clip], rtol=1e-4)


@pytest.mark.parametrize("clip", MASSIVE)
def test_massive_rows(trained: Trained, clip: str) -> None:
    """They are the jump: without those behind block 4, the largest step is the next one."""
    norms, states, own = trained.heard(BASE, clip)
    n, others, share = MASSIVE[clip]
    massive = norms.is_massive[4, 0]
    assert not norms.is_massive[:4].any()
    assert massive.sum() == n
    assert massive[own].sum() == (0 if clip == "tone" else n)
    assert norms.massive_share()[4, 0] == pytest.approx(share, abs=5e-4)
    found = norms.total(~massive[None])[1:, 0]
    np.testing.assert_allclose(found, others, rtol=2e-4)
    assert (found[1:] / found[:-1]).argmax() == 3
    squares = [state.double().square().sum(0) for state in states]
    shares = [float(one[388] / one.sum()) for one in squares]
    np.testing.assert_allclose(shares[4:], [0.82, 0.71, 0.59], atol=0.016)
    assert max(shares[1:4]) < 0.035
    if clip == "tone":
        mine = np.zeros_like(norms.is_massive[0])
        mine[0, own] = True
        expected = [213.4, 208.2, 208.6, 236.2, 342.3, 442.1]
        np.testing.assert_allclose(norms.total(mine)[1:, 0], expected, rtol=4e-4)


@pytest.mark.parametrize(("name", "clip"), CKA)
def test_similarity_to_the_final_state(trained: Trained, name: str, clip: str) -> None:
    _, states, own = trained.heard(name, clip)
    rows = [state[own] for state in states]
    for debiased, expected in zip((False, True), CKA[name, clip], strict=True):
        found = [linear_cka(one, rows[-1], debiased=debiased) for one in rows]
        np.testing.assert_allclose(found, [*expected, 1], atol=0.002)


@pytest.mark.parametrize("name", [TINY, BASE])
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_transcripts_and_the_encoder_lens(trained: Trained, name: str) -> None:
    """The last depth, normed, is the memory and gives the transcript; those before do not."""
    model, x = trained.hooked(name), trained.prepared(name, "cut")
    _, states, _ = trained.heard(name, "cut")
    memories = [model.audio.encoder.ln_final(state[None]) for state in states]
    assert torch.equal(model(x, memory=memories[-1]), model(x))
    tokens = model.generate(x, return_type="tokens", memory=memories[-1])
    assert torch.equal(tokens, model.generate(x, return_type="tokens"))
    assert model.tokenizer.batch_decode(tokens) == [SAID[name]]
    # Depth 1 of one predicts times, which nobody asked for and text leaves out.
    times = range(model.generation_config.no_timestamps_token_id + 1, model.cfg.d_vocab)
    mute = [*model.generation_config.suppress_tokens, *times]
    for memory, expected in zip(memories[:-1], LENS[name], strict=True):
        assert model.generate(x, 16, memory=memory, suppress_tokens=mute) == [expected]


@pytest.mark.filterwarnings("ignore")
def test_the_page_runs(
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The code of ``docs/whisper.md``, one block behind the other; it shows what the page says."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / BASE).symlink_to(trained.root / BASE)
    soundfile.write("recording.wav", trained.clips["cut"], 16000, subtype="PCM_16")
    page = (Path(__file__).parents[2] / "docs" / "whisper.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    for code in blocks:
        exec(compile(code, "whisper.md", "exec"), names)
    said = [line[2:] for code in blocks for line in code.splitlines() if line.startswith("# ")]
    assert len(said) > 10
    assert capsys.readouterr().out.splitlines() == said
    assert names["transcript"] == SAID[BASE]
