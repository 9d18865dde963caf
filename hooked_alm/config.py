"""Sizes and variants of one hooked decoder."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import torch

from .errors import ConversionError, InputError

AttentionImplementation = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"]
LayerType = Literal["full_attention", "sliding_attention"]

STATIC_ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary variants whose frequencies do not depend on the length of the input."""

_SIZES = "n_layers d_model n_heads n_key_value_heads d_head d_mlp d_vocab n_ctx".split()


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Blocks like the trunk's, which start from the output of one of them and lead to a head."""

    head: str
    """Name of the head for ``towards``; the trunk's is "text"."""
    prefix: str
    """Prefix of the names of its blocks, norm and unembedding."""
    n_layers: int
    from_layer: int
    """Block of the trunk whose output the first one reads."""


@dataclass(kw_only=True)
class HookedALMConfig:
    """Sizes and variants of a decoder. Field names are TransformerLens' where it has one.

    Everything that the checkpoint decides has no default. Assignment is validated, since
    TransformerLens' tools flip flags on a live model.

    Raises:
        ConversionError: a value that the decoder does not implement.
        InputError: an unknown field.
    """

    n_layers: int
    """Number of blocks L. Depths run 0..L, blocks 0..L-1."""
    d_model: int
    """Width of the residual stream."""
    n_heads: int
    """Query heads."""
    n_key_value_heads: int
    """Key/value heads; equal to ``n_heads`` without grouping."""
    d_head: int
    """Width of a head; not always ``d_model / n_heads``."""
    d_mlp: int
    """Width of the gated MLP."""
    d_vocab: int
    """Rows of the embedding and of the unembedding."""
    n_ctx: int
    """Longest input the checkpoint was made for."""
    eps: float
    """Epsilon that RMSNorm adds to the mean square."""
    act_fn: str
    """Activation of the MLP's gate, by its transformers name."""
    qkv_bias: bool
    """Whether q, k and v have a bias (Qwen2 yes, LLaMA no). The output projection has none."""
    qk_norm: bool
    """Whether q and k pass an RMSNorm over each head before rotation (Qwen3)."""
    tie_word_embeddings: bool
    """Whether the unembedding is the embedding."""
    rope_parameters: dict[str, Any]
    """transformers' ``rope_parameters``: ``rope_type``, ``rope_theta`` and scaling constants."""
    layer_types: tuple[LayerType, ...]
    """Type of each block: attends to everything before it, or to a sliding window."""
    sliding_window: int | None
    """Positions a sliding-window block sees, itself included."""
    original_architecture: str
    """Class name in the published config."""
    model_name: str
    """Id or folder the weights came from."""
    embedding_multiplier: float = 1.0
    """Factor on token and audio embeddings alike, before the first block (Granite)."""
    residual_multiplier: float = 1.0
    """Factor on what attention and MLP write to the residual stream (Granite)."""
    attention_multiplier: float | None = None
    """Scale of the attention scores; None is ``d_head ** -0.5``."""
    logits_scaling: float = 1.0
    """Divisor of the logits (Granite)."""
    branches: tuple[Branch, ...] = ()
    """Stacks besides the trunk, each with a head of its own (Kimi-Audio)."""
    two_token_streams: bool = False
    """Whether a position has two token ids, whose embeddings are added (Kimi-Audio)."""
    attn_implementation: AttentionImplementation = "sdpa"
    """Attention kernel where nothing inside the attention is intervened on."""
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tokenizer_name: str | None = None
    use_attn_result: bool = False
    """Whether a cache without names keeps ``hook_result``."""
    use_split_qkv_input: bool = False
    """Whether a cache without names keeps the split inputs of q, k and v."""
    use_attn_in: bool = False
    """Whether a cache without names keeps ``hook_attn_in``."""
    use_hook_mlp_in: bool = False
    """Whether a cache without names keeps ``hook_mlp_in``."""
    use_hook_tokens: bool = False
    """Whether a cache without names keeps ``hook_tokens``. Like the four above it decides nothing
    else: a point that is hooked always computes."""
    ungroup_grouped_query_attention: bool = False
    """Keys and values per query head; set by ``set_ungroup_grouped_query_attention``."""
    default_prepend_bos: bool = False
    """Whether TransformerLens' `induction_loss` begins with a BOS token; nothing here reads it."""
    normalization_type: Literal["RMS", "RMSPre"] = "RMS"
    """RMSPre once the norms' scales are folded into the weights that read them."""
    adapter: str | None = None
    """Folder of the LoRA adapter that was applied on loading."""
    weight_processing: tuple[str, ...] = ()
    """Steps done to the weights; empty while they are the checkpoint's, equal to HF's."""
    final_rms: bool = True
    attn_only: bool = False
    gated_mlp: bool = True
    positional_embedding_type: Literal["rotary"] = "rotary"

    def __post_init__(self) -> None:
        """Check sizes against each other."""
        problems = [
            f"{name} = {getattr(self, name)}, expected a positive integer"
            for name in _SIZES
            if not (isinstance(getattr(self, name), int) and getattr(self, name) > 0)
        ]
        if not problems and self.n_heads % self.n_key_value_heads:
            problems.append(
                f"n_heads = {self.n_heads} is not a multiple of "
                f"n_key_value_heads = {self.n_key_value_heads}"
            )
        if len(self.layer_types) != self.n_layers:
            problems.append(f"{len(self.layer_types)} layer_types for {self.n_layers} layers")
        if unknown := set(self.layer_types) - set(get_args(LayerType)):
            problems.append(f"layer_types {sorted(unknown)}, expected {get_args(LayerType)}")
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            problems.append("sliding_attention layers without a sliding_window")
        problems += [
            f"{one.n_layers} layers of branch {one.head!r} from layer {one.from_layer}"
            for one in self.branches
            if one.n_layers < 1 or one.from_layer not in range(self.n_layers)
        ]
        if (rope := self.rope_parameters.get("rope_type")) not in STATIC_ROPES:
            problems.append(f"rope_type = {rope!r}, expected one of {STATIC_ROPES}")
        if problems:
            raise ConversionError(f"decoder of {self.model_name!r}: " + "; ".join(problems) + ".")

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse unknown fields and impossible values; a refused value leaves the old one."""
        if name not in _FIELD_NAMES:
            raise InputError(
                f"setting cfg.{name}: HookedALMConfig has no such field. "
                f"It has: {', '.join(sorted(_FIELD_NAMES))}."
            )
        before = dict(vars(self))
        super().__setattr__(name, value)
        if len(before) == len(_FIELD_NAMES):  # not while the fields are first set
            try:
                self.__post_init__()
            except ConversionError:
                super().__setattr__(name, before[name])
                raise

    @property
    def beyond_hooked_transformer(self) -> list[str]:
        """Fields by which this decoder does what no HookedTransformer's weights can say."""
        plain = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
                 "attention_multiplier": None, "branches": ()}  # fmt: skip
        return [name for name, value in plain.items() if getattr(self, name) != value]

    @property
    def n_params(self) -> int:
        """Number of weights as HookedTransformer's config counts them; see ``n_params_total``.

        Matrices of attention and MLP in the trunk's blocks, keys and values once per query head;
        no embeddings, norms or biases.
        """
        attn, mlp = 4 * self.n_heads * self.d_head, 3 * self.d_mlp
        return self.n_layers * self.d_model * (attn + mlp)

    @property
    def n_groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.n_heads // self.n_key_value_heads


_FIELD_NAMES = frozenset(f.name for f in fields(HookedALMConfig))


def check_device(attempt: str, device: torch.device | str | int | None) -> None:
    """Refuse a device that this machine or this torch does not have.

    Raises:
        InputError: there is no such device.
    """
    try:
        torch.empty(0, device=device)
    # AssertionError: how a torch without CUDA answers.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(
            f"{attempt} device {str(device)!r}: {reason}. Give one that `hooked-alm doctor` "
            "finds; cpu is always there."
        ) from error
