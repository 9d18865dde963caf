"""Time the hooked forward and its cache against Hugging Face, and measure memory while loading.

Both models hold the same random weights in one process; calls alternate, so that noise of the
machine hits both. Prints medians of the pairwise ratios with their bootstrap interval.

    python scripts/bench_forward.py [--pairs 40] [--positions 200 800] [--load] [--encoder]
"""

import argparse
import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from hooked_alm import ALMInput, HookedALM
from hooked_alm.converters.blocks.whisper_encoder import encoder_config, encoder_rules
from hooked_alm.converters.loading import lay_out
from hooked_alm.converters.rules import target_of
from hooked_alm.encoder import AudioEncoder

MEL_FRAMES = 3000


SMALL = dict(
    d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=48, num_mel_bins=8
)
BASE = dict(
    d_model=512, encoder_layers=6, encoder_attention_heads=8, encoder_ffn_dim=2048, num_mel_bins=80
)
LARGE = dict(
    d_model=1280, encoder_layers=2, encoder_attention_heads=20, encoder_ffn_dim=5120,
    num_mel_bins=128,
)  # fmt: skip
"""Encoders: as small as possible, of Whisper-base's geometry, and two layers of the large one."""


def make_checkpoint(
    folder: Path, d_model: int = 512, n_layers: int = 12, encoder: dict[str, int] = SMALL
) -> None:
    """A random Qwen2-Audio, by default with 12 layers of width 512, and 8 heads."""
    config = Qwen2AudioConfig(
        text_config=dict(
            model_type="qwen2", hidden_size=d_model, intermediate_size=4 * d_model,
            num_hidden_layers=n_layers, num_attention_heads=8, num_key_value_heads=8,
            vocab_size=1000, max_position_embeddings=4096,
        ),
        audio_config=dict(
            model_type="qwen2_audio_encoder", max_source_positions=MEL_FRAMES // 2, **encoder
        ),
        audio_token_index=999,
    )  # fmt: skip
    Qwen2AudioForConditionalGeneration(config).eval().save_pretrained(folder)


def prompt(model: HookedALM, n_pos: int) -> ALMInput:
    """A prompt of ``n_pos`` positions, all but 50 of them audio."""
    n_frames = 4 * (n_pos - 50)
    assert model.audio is not None
    n_audio = model.audio.n_tokens(n_frames)
    ids = [1] * 25 + [model.audio.tokens.placeholder] * n_audio + [2] * (n_pos - n_audio - 25)
    return model.encode(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, n_pos, dtype=torch.long),
        input_features=torch.randn(1, model.audio.feature_shape[0], MEL_FRAMES),
        feature_attention_mask=(torch.arange(MEL_FRAMES) < n_frames).long()[None],
    )


def paired_times(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    n: int,
    clock: Callable[[], float] = time.perf_counter,
) -> np.ndarray:
    """Seconds ``[pair, ours or theirs]`` of alternating calls, behind one of each."""
    for call in (ours, theirs):
        call()
    times = np.empty((n, 2))
    for pair in range(n):
        order = (0, 1) if pair % 2 else (1, 0)
        for which in order:
            start = clock()
            (ours, theirs)[which]()
            times[pair, which] = clock() - start
    return times


def median_and_interval(ratios: np.ndarray) -> tuple[float, list[float]]:
    """Median, and its 95 % bootstrap interval."""
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    ends = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(np.median(ratios)), [float(end) for end in ends]


def shown(ratios: np.ndarray) -> str:
    """``median [low, high]``."""
    median, (low, high) = median_and_interval(ratios)
    return f"{median:.3f} [{low:.3f}, {high:.3f}]"


def paired_ratio(ours: Callable[[], object], theirs: Callable[[], object], n: int) -> str:
    """Median of ours / theirs over alternating calls, with its 95 % bootstrap interval."""
    times = paired_times(ours, theirs, n)
    median = np.median(times, axis=0) * 1000
    return (
        f"{shown(times[:, 0] / times[:, 1])}   "
        f"({median[0]:.1f} ms against {median[1]:.1f} ms, {n} pairs)"
    )


@torch.no_grad()
def bench_speed(folder: Path, positions: list[int], n_pairs: int) -> None:
    """Forward, and ``run_with_cache`` of residuals and z, against the HF decoder under sdpa.

    The audio is embedded beforehand on both sides, so that only the decoder is timed.
    """
    hf = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    model = HookedALM.from_pretrained(str(folder))
    unlocked = HookedALM.forward.__wrapped__  # type: ignore[attr-defined]  # by turns.in_turn
    ends = ("hook_resid_pre", "hook_resid_post", "_z")
    names = [n for n in model.hook_dict if n.startswith("blocks.") and n.endswith(ends)]
    for n_pos in positions:
        x = prompt(model, n_pos)
        embeddings = model(x, stop_at_layer=0)

        def hooked(x: ALMInput = x, embeddings: torch.Tensor = embeddings) -> object:
            return model(embeddings, start_at_layer=0, inputs=x)

        def cached(x: ALMInput = x, embeddings: torch.Tensor = embeddings) -> object:
            return model.run_with_cache(embeddings, start_at_layer=0, inputs=x, names_filter=names)

        def hugging_face(x: ALMInput = x, embeddings: torch.Tensor = embeddings) -> object:
            return hf(
                inputs_embeds=embeddings,
                attention_mask=x.attention_mask,
                position_ids=x.position_ids,
                use_cache=False,
            ).logits

        def without_turns(x: ALMInput = x, embeddings: torch.Tensor = embeddings) -> object:
            return unlocked(model, embeddings, start_at_layer=0, inputs=x)

        assert torch.equal(model(x), hugging_face())  # the same work, to the bit
        ratio = paired_ratio(hooked, hugging_face, n_pairs)
        print(f"T = {n_pos}: forward / HF sdpa               {ratio}")
        ratio = paired_ratio(cached, hugging_face, n_pairs)
        print(f"T = {n_pos}: run_with_cache(resid, z) / HF   {ratio}")
        ratio = paired_ratio(hooked, without_turns, n_pairs)
        print(f"T = {n_pos}: forward / without its lock      {ratio}")


@torch.no_grad()
def bench_encoder(n_pairs: int) -> None:
    """The audio encoder against transformers': Whisper-base, and two layers of the large one."""
    for name, sizes in (("base", BASE), ("large, two layers", LARGE)):
        config = WhisperConfig(**sizes, attn_implementation="sdpa")
        theirs, ours = WhisperEncoder(config).eval(), AudioEncoder(encoder_config(config))
        weights = {
            (target_of(encoder_rules(""), key) or "").removeprefix("audio.encoder."): value
            for key, value in theirs.state_dict().items()
        }
        ours.load_state_dict(weights)
        mel = torch.randn(1, sizes["num_mel_bins"], MEL_FRAMES)
        assert torch.equal(ours(mel), theirs(mel).last_hidden_state)
        ratio = paired_ratio(partial(ours, mel), partial(theirs, mel), n_pairs)
        print(f"Whisper {name}: encoder / HF sdpa          {ratio}")


@torch.no_grad()
def bench_whole(folder: Path, n_pairs: int) -> None:
    """From the spectrogram to the logits, encoded anew every time, against Hugging Face's."""
    make_checkpoint(folder, n_layers=4, encoder=BASE)
    hf = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    model = HookedALM.from_pretrained(str(folder))
    x = prompt(model, 300)
    inputs = model.hf_arguments(x)

    def hooked() -> torch.Tensor:
        x.clips[0].forget()
        found: torch.Tensor = model(x)
        return found

    def hugging_face() -> torch.Tensor:
        found: torch.Tensor = hf(**inputs, use_cache=False).logits
        return found

    assert torch.equal(hooked(), hugging_face())
    ratio = paired_ratio(hooked, hugging_face, n_pairs)
    print(f"Whisper base and 4 blocks: whole forward / HF sdpa   {ratio}")


def memory_of_loading(folder: Path, dtype: str) -> None:
    """Print growth of peak resident memory while loading, in this fresh process."""
    lay_out(folder)  # imports and tokenizer machinery must not count
    gc.collect()
    # The kernel's own high-water mark, reset: getrusage's is inherited from the parent.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    model = HookedALM.from_pretrained(str(folder), dtype=dtype)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    grown = memory("VmHWM") - before
    print(
        f"load as {dtype}: {weights / 1e6:.0f} MB of weights, peak memory grew by "
        f"{grown / 1e6:.0f} MB = {grown / weights:.3f} x"
    )


def memory(field: str) -> int:
    """A field of ``/proc/self/status`` in bytes: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    """Parse arguments and run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--positions", type=int, nargs="+", default=[200, 800])
    parser.add_argument(
        "--encoder", action="store_true", help="the audio encoder, alone and in a whole run"
    )
    parser.add_argument("--load", action="store_true", help="memory while loading, too")
    parser.add_argument("--load-one", nargs=2, metavar=("FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load_one:
        memory_of_loading(Path(options.load_one[0]), options.load_one[1])
        return
    torch.manual_seed(0)
    if options.encoder:
        bench_encoder(options.pairs)
        with tempfile.TemporaryDirectory() as scratch:
            bench_whole(Path(scratch), options.pairs)
        return
    with tempfile.TemporaryDirectory() as scratch:
        small = Path(scratch) / "small"
        make_checkpoint(small)
        bench_speed(small, options.positions, options.pairs)
        if options.load:
            large = Path(scratch) / "large"
            make_checkpoint(large, d_model=2048, n_layers=10)
            for dtype in ("float32", "bfloat16"):
                subprocess.run(
                    [sys.executable, __file__, "--load-one", str(large), dtype], check=True
                )


if __name__ == "__main__":
    main()
