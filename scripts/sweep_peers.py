"""The libraries that ``bench_sweeps`` compares: one model, and every peer's way to patch a cell.

All hold the same random weights and are given the same merged embeddings, so that every side hears
the audio.
"""

import copy
import logging
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from hooked_alm import ALMInput, HookedALM
from hooked_alm.bundled import model_folder
from hooked_alm.methods.patching.metrics import LogitDiff

N_BEFORE = 20
"""Number of positions before the audio."""
VOCABULARY = 1000
ANSWER, OTHER = 3, 7
METRIC = LogitDiff(ANSWER, OTHER)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the model and its prompt. MLPs are four times as wide as the stream."""

    positions: int = 800
    text: int = 30
    """Number of positions after the audio."""
    layers: int = 12
    heads: int = 8
    kv_heads: int = 8
    d_model: int = 512
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def audio(self) -> slice:
        """Positions of the audio."""
        return slice(N_BEFORE, self.positions - self.text)

    @property
    def n_audio(self) -> int:
        """Number of positions of the audio."""
        return self.audio.stop - self.audio.start

    def columns(self, head: int) -> slice:
        """Columns of a query head in a projection."""
        width = self.d_model // self.heads
        return slice(head * width, (head + 1) * width)


class Cell(NamedTuple):
    """A patch that every side can make."""

    index: tuple[int, ...]
    """Index of the cell's value in our result."""
    site: str
    layer: int
    where: slice
    head: int | None = None
    sender: tuple[int, int] | None = None
    """Layer and head whose direct edge to this query is patched."""


def metric(logits: Tensor) -> float:
    """Value of ``METRIC`` on whole logits."""
    return float(logits[0, -1, ANSWER].float() - logits[0, -1, OTHER].float())


class Models:
    """The Hugging Face model under sdpa, ours, and a pair of prompts that differ in their clip."""

    def __init__(self, sizes: Sizes, folder: Path) -> None:
        self.sizes, self.dtype = sizes, getattr(torch, sizes.dtype)
        make_checkpoint(folder, sizes)
        self.hf: Any = Qwen2AudioForConditionalGeneration.from_pretrained(
            folder, dtype=self.dtype, device_map=sizes.device
        ).eval()
        device = torch.device(sizes.device)
        self.model = HookedALM.from_pretrained(str(folder), dtype=self.dtype, device=device)
        self.base, self.donor = self.prompt(seed=1), self.prompt(seed=2)
        with torch.no_grad():
            self.embedded = [self.model(x, stop_at_layer=0) for x in (self.base, self.donor)]

    def prompt(self, seed: int) -> ALMInput:
        """A prompt of one row; the clip depends on the seed, the text does not."""
        ids, mask, features, feature_mask = self.arguments(seed)
        return self.model.encode(
            input_ids=ids,
            attention_mask=mask,
            input_features=features,
            feature_attention_mask=feature_mask,
        )

    def arguments(self, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids, their mask, features and their mask."""
        n_frames = 4 * self.sizes.n_audio
        ids = 10 + torch.arange(self.sizes.positions)[None] % 900
        ids[:, self.sizes.audio] = VOCABULARY - 1
        features = torch.randn(1, 8, n_frames, generator=torch.Generator().manual_seed(seed))
        feature_mask = torch.ones(1, n_frames, dtype=torch.long)
        return ids, torch.ones_like(ids), features.to(self.dtype), feature_mask

    @property
    def hf_inputs(self) -> dict[str, Any]:
        """Arguments of Hugging Face's forward beside the embeddings."""
        x = self.base
        return dict(attention_mask=x.attention_mask, position_ids=x.position_ids, use_cache=False)

    def generation_inputs(self) -> dict[str, Any]:
        """Arguments of Hugging Face's ``generate`` for the base."""
        device = self.sizes.device
        ids, mask, features, feature_mask = self.arguments(seed=1)
        return {
            "input_ids": ids.to(device),
            "attention_mask": mask.to(device),
            "input_features": features.to(device),
            "feature_attention_mask": feature_mask.to(device),
        }

    def forward(self, which: int = 0) -> Tensor:
        """Hugging Face's logits of the base (0) or the donor (1)."""
        logits: Tensor = self.hf(inputs_embeds=self.embedded[which], **self.hf_inputs).logits
        return logits

    def twin(self) -> Any:
        """Another HF model over the same parameters, for libraries that rewrite its modules."""
        shared: dict[int, Any] = {id(t): t for t in (*self.hf.parameters(), *self.hf.buffers())}
        return copy.deepcopy(self.hf, shared)


def make_checkpoint(folder: Path, sizes: Sizes) -> None:
    """A random Qwen2-Audio with an encoder as small as possible."""
    config = Qwen2AudioConfig(
        text_config=dict(
            model_type="qwen2", hidden_size=sizes.d_model, intermediate_size=4 * sizes.d_model,
            num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads, vocab_size=VOCABULARY,
            max_position_embeddings=max(4096, sizes.positions),
            initializer_range=sizes.d_model**-0.5,  # so that effects are far above the rounding
        ),
        audio_config=dict(
            model_type="qwen2_audio_encoder", d_model=32, encoder_layers=1,
            encoder_attention_heads=2, encoder_ffn_dim=48, num_mel_bins=8,
            max_source_positions=2 * sizes.n_audio,
            initializer_range=0.3,  # so that clips differ behind it
        ),
        audio_token_index=VOCABULARY - 1,
    )  # fmt: skip
    _save_random(config, folder, sizes)


def make_hearing_checkpoint(folder: Path, sizes: Sizes) -> None:
    """A random Qwen2-Audio with a decoder of these sizes, that is the bundled one in all else."""
    source = model_folder("bundled:follows_text")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = Qwen2AudioConfig.from_pretrained(source)
    decoder = {
        "hidden_size": sizes.d_model, "intermediate_size": 4 * sizes.d_model,
        "num_hidden_layers": sizes.layers, "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads, "layer_types": ["full_attention"] * sizes.layers,
        "initializer_range": sizes.d_model**-0.5,
    }  # fmt: skip
    for name, value in decoder.items():
        setattr(config.text_config, name, value)
    _save_random(config, folder, sizes)


def _save_random(config: Any, folder: Path, sizes: Sizes) -> None:
    """Random weights, biases and norms too."""
    torch.manual_seed(0)
    with torch.device(sizes.device):
        hf: Any = Qwen2AudioForConditionalGeneration(config).to(getattr(torch, sizes.dtype))
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    hf.save_pretrained(folder)


class HuggingFace:
    """Forward hooks on the Hugging Face model, with its fused attention."""

    name = "hf_hooks"

    def __init__(self, models: Models) -> None:
        self.models = models
        self.layers = models.hf.model.language_model.layers

    @cached_property
    def seen(self) -> list[dict[tuple[str, int], Tensor]]:
        """Activations of base and donor: stream and z by layer, ``[batch, pos, features]``."""
        both: list[dict[tuple[str, int], Tensor]] = []
        for which in (0, 1):
            both.append({})
            handles = [
                module.register_forward_pre_hook(partial(_remember, both[-1], (site, layer)))
                for layer, block in enumerate(self.layers)
                for site, module in (("resid_pre", block), ("z", block.self_attn.o_proj))
            ]
            handles += [
                block.mlp.register_forward_hook(
                    lambda _, args, out, seen=both[-1], layer=layer: _remember(
                        seen, ("mlp_out", layer), _, (out,)
                    )
                )
                for layer, block in enumerate(self.layers)
            ]
            self.models.forward(which)
            for handle in handles:
                handle.remove()
        return both

    def new_values(self, cell: Cell) -> tuple[slice, Tensor]:
        """Columns to write, and what: for an edge, the head's query of its new input."""
        if cell.head is None:
            return slice(None), self.seen[1][cell.site, cell.layer][:, cell.where]
        columns = self.models.sizes.columns(cell.head)
        if cell.sender is None:
            return columns, self.seen[1][cell.site, cell.layer][:, cell.where, columns]
        layer, head = cell.sender
        own = self.models.sizes.columns(head)
        base_z, donor_z = (seen["z", layer][:, cell.where, own] for seen in self.seen)
        message = F.linear(donor_z - base_z, self.layers[layer].self_attn.o_proj.weight[:, own])
        block = self.layers[cell.layer]
        # Nothing below the receiver changes: what it reads otherwise is the base run's.
        stream = self.seen[0]["resid_pre", cell.layer][:, cell.where] + message
        q = block.self_attn.q_proj
        return columns, F.linear(block.input_layernorm(stream), q.weight[columns], q.bias[columns])

    def value(self, cell: Cell) -> float:
        """The metric of one forward with one patch."""
        columns, new = self.new_values(cell)

        def written(value: Tensor) -> Tensor:
            value = value.clone()
            value[:, cell.where, columns] = new
            return value

        block = self.layers[cell.layer]
        if cell.sender is not None or cell.site == "mlp_out":
            module = block.mlp if cell.sender is None else block.self_attn.q_proj
            handle = module.register_forward_hook(lambda _, args, out: written(out))
        else:
            module = block if cell.site == "resid_pre" else block.self_attn.o_proj
            handle = module.register_forward_pre_hook(lambda _, args: (written(args[0]), *args[1:]))
        try:
            return metric(self.models.forward())
        finally:
            handle.remove()


def _remember(seen: dict[Any, Tensor], name: Any, module: object, args: tuple[Tensor]) -> None:
    seen[name] = args[0]


class NNsight(HuggingFace):
    """Writes in traces of nnsight, over a model of its own."""

    name = "nnsight"

    def __init__(self, models: Models) -> None:
        from nnsight import NNsight as Wrapped

        super().__init__(models)
        self.wrapped: Any = Wrapped(models.twin())

    def value(self, cell: Cell) -> float:
        """The metric of one trace."""
        columns, new = self.new_values(cell)
        where, block = cell.where, self.wrapped.model.language_model.layers[cell.layer]
        stream = self.models.embedded[0].clone()  # written in place at the first block
        with self.wrapped.trace(inputs_embeds=stream, **self.models.hf_inputs):
            if cell.sender is not None:
                block.self_attn.q_proj.output[:, where, columns] = new
            elif cell.site == "mlp_out":
                block.mlp.output[:, where] = new
            elif cell.site == "z":
                block.self_attn.o_proj.input[:, where, columns] = new
            else:
                block.input[:, where] = new
            logits = self.wrapped.output.logits.save()
        return metric(logits)


class Bridge:
    """TransformerLens' bridge and its ``generic_activation_patch``; edges by its split inputs."""

    name = "bridge"

    def __init__(self, models: Models) -> None:
        self.models, twin = models, models.twin()
        twin.set_attn_implementation("eager")  # as the bridge's own loader does
        logger = logging.getLogger("transformers")
        level = logger.level
        with warnings.catch_warnings():
            # Built around a loaded model it looks for no processor, and so installs nothing.
            from transformer_lens.model_bridge.sources import build_bridge_from_module

            self.bridge: Any = build_bridge_from_module(
                twin, "Qwen2AudioForConditionalGeneration", hf_config=twin.config
            )
        logger.setLevel(level)  # importing the bridge silences it for good
        self.bridge.eval()

    @cached_property
    def caches(self) -> list[Any]:
        """Caches of base and donor."""
        self.bridge.set_use_split_qkv_input(False)
        return [
            self.bridge.run_with_cache(
                stream.clone(),
                names_filter=lambda n: n.endswith(("hook_z", "hook_resid_pre", "hook_mlp_out")),
            )[1]
            for stream in self.models.embedded
        ]

    def value(self, cell: Cell) -> float:
        """The metric of one cell of its sweep."""
        caches, is_edge = self.caches, cell.sender is not None
        if self.bridge.cfg.use_split_qkv_input != is_edge:
            self.bridge.set_use_split_qkv_input(is_edge)
        return self.edge(cell, *cell.sender) if cell.sender else self.node(cell, caches[1])

    def node(self, cell: Cell, donor: Any) -> float:
        """Metric with one activation replaced."""
        from transformer_lens import patching

        where = (slice(None), cell.where, *(() if cell.head is None else (cell.head,)))

        def setter(value: Tensor, index: Sequence[int], theirs: Tensor) -> Tensor:
            value = value.clone()  # or the first block's would be the caller's embeddings
            value[where] = theirs[where]
            return value

        with mock.patch.object(patching, "tqdm", lambda rows: rows):
            found = patching.generic_activation_patch(
                self.bridge, self.models.embedded[0], donor,
                lambda logits: torch.tensor(metric(logits)), setter,
                activation_name=cell.site, index_df=pd.DataFrame({"layer": [cell.layer]}),
            )  # fmt: skip
        return float(found[0])

    def edge(self, cell: Cell, layer: int, head: int) -> float:
        """Metric with one head's message added to one head's query input, there alone."""
        z = [cache[f"blocks.{layer}.attn.hook_z"][:, cell.where, head] for cache in self.caches]
        message = (z[1] - z[0]) @ self.bridge.blocks[layer].attn.W_O[head]

        def add(stream: Tensor, hook: object) -> Tensor:
            stream = stream.clone()
            stream[:, cell.where, cell.head] += message
            return stream

        name = f"blocks.{cell.layer}.attn.hook_q_input"
        return metric(self.bridge.run_with_hooks(self.models.embedded[0], fwd_hooks=[(name, add)]))


PEERS: dict[str, Any] = {"bridge": Bridge, "hf_hooks": HuggingFace, "nnsight": NNsight}


def made_peers(models: Models, names: Sequence[str]) -> list[Any]:
    """Peers that can be imported; for the others, the reason is printed."""
    peers = []
    for name in names:
        try:
            peers.append(PEERS[name](models))
        except ImportError as error:
            print(f"left out: {name}, which cannot be imported ({error})")
    return peers
