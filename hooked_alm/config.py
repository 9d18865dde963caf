"""Sizes and variants of stacks of blocks: of a decoder, of an audio encoder."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeGuard, get_args

import torch

from .errors import ConversionError, InputError

AttentionImplementation = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"]
LayerType = Literal["full_attention", "sliding_attention"]

_ROPE_NEEDS = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "llama3": ("rope_theta", "factor", "low_freq_factor", "high_freq_factor",
               "original_max_position_embeddings"),
    "yarn": ("rope_theta", "factor"),
}  # fmt: skip
STATIC_ROPES = tuple(_ROPE_NEEDS)
"""Rotary variants whose frequencies do not depend on the length of the input."""
_ROPE_TAKES = ("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor",
               "mscale", "mscale_all_dim")  # fmt: skip
"""Numbers that a rotary variant may have besides."""

MOST_LAYERS, LARGEST = 1000, 2**24
"""Bounds of the counts of layers, and of all other sizes but lengths, far above any published
model: what is beyond them is damaged, and would be laid out for hours or in terabytes."""


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
class StackConfig:
    """Sizes and variants of a stack of blocks: all that a block reads of the model.

    Field names are TransformerLens' where it has one. What the checkpoint decides has no default,
    but for variants that one kind of model has.

    Raises:
        ConversionError: a value that blocks do not implement.
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
    """Width of the MLP."""
    n_ctx: int
    """Longest input the checkpoint was made for."""
    eps: float
    """Epsilon that a norm adds to the mean square, or to the variance."""
    act_fn: str
    """Activation of the MLP, or of its gate, by its transformers name."""
    attn_bias: str
    """Projections of the attention that have a bias, some of the letters q, k, v and o: "qkv" in
    Qwen2, "" in LLaMA, "qvo" in Whisper."""
    qk_norm: bool = False
    """Whether q and k pass an RMSNorm over each head before rotation (Qwen3)."""
    mlp_bias: bool = False
    """Whether the MLP's projections have biases (Whisper)."""
    gated_mlp: bool = True
    normalization_type: Literal["RMS", "RMSPre", "LN"] = "RMS"
    """RMSPre once the norms' scales are folded into the weights that read them."""
    positional_embedding_type: Literal["rotary", "standard"] = "rotary"
    """Positions that turn queries and keys, or that the stack's input has in it."""
    attention_dir: Literal["causal", "bidirectional"] = "causal"
    scales_queries: bool = False
    """Whether queries are scaled before the kernel instead of scores inside it: another rounding
    (Whisper)."""
    softmax_in_float32: bool = True
    """Whether explicit patterns are computed in fp32 whatever the dtype of the scores."""
    cross_attention: bool = False
    """Whether a block reads a memory between attention and MLP (Whisper's decoder)."""
    clamps_fp16: bool = False
    """Whether a block keeps its fp16 output finite (Whisper's encoder)."""
    sliding_window: int | None = None
    """Positions a sliding-window block sees, itself included."""
    residual_multiplier: float = 1.0
    """Factor on what attention and MLP write to the residual stream (Granite)."""
    attention_multiplier: float | None = None
    """Scale of the attention scores; None is ``d_head ** -0.5``."""
    attn_implementation: AttentionImplementation = "sdpa"
    """Attention kernel where nothing inside the attention is intervened on."""
    ungroup_grouped_query_attention: bool = False
    """Keys and values per query head; set by ``set_ungroup_grouped_query_attention``."""

    def __post_init__(self) -> None:
        """Check sizes against each other."""
        if problems := [*self._problems()]:
            raise ConversionError(f"{self._title}: " + "; ".join(problems) + ".")

    @property
    def _title(self) -> str:
        return "stack of blocks"

    @property
    def _sizes(self) -> dict[str, int]:
        """Bounds of the fields that count something."""
        large = ("d_model", "n_heads", "n_key_value_heads", "d_head", "d_mlp")
        return {"n_layers": MOST_LAYERS, **dict.fromkeys(large, LARGEST), "n_ctx": 2**53}

    def _problems(self) -> Iterator[str]:
        yield from self._size_problems()
        yield from self._real_problems()

    def _size_problems(self) -> Iterator[str]:
        misfits = [
            f"{name} = {getattr(self, name)!r:.60}, expected a whole number from 1 to {most}"
            for name, most in self._sizes.items()
            if not is_size(getattr(self, name), most)
        ]
        yield from misfits
        if misfits:
            return
        if self.n_heads % self.n_key_value_heads:
            yield (
                f"n_heads = {self.n_heads} is not a multiple of "
                f"n_key_value_heads = {self.n_key_value_heads}"
            )
        if self.d_head % 2 and self.positional_embedding_type == "rotary":
            yield f"d_head = {self.d_head}, expected an even number: rotary positions turn pairs"

    def _real_problems(self) -> Iterator[str]:
        if not (is_real(self.eps) and self.eps >= 0):
            yield f"eps = {self.eps!r}, expected a number that is not negative"
        for name in ("residual_multiplier", "attention_multiplier"):
            value = getattr(self, name)
            if not is_real(value) and (name, value) != ("attention_multiplier", None):
                yield f"{name} = {value!r}, expected a number"

    @property
    def n_groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.n_heads // self.n_key_value_heads


@dataclass(kw_only=True)
class EncoderConfig(StackConfig):
    """Sizes and variants of a Whisper-type audio encoder; ``n_ctx`` counts its positions."""

    n_mels: int
    """Bins of the spectrogram."""
    pooling: int = 1
    """Positions that are averaged into one between the last block and the final norm."""
    takes_shorter: bool = False
    """Whether windows may be shorter than ``n_ctx`` positions."""
    gated_mlp: bool = False
    mlp_bias: bool = True
    attn_bias: str = "qvo"
    eps: float = 1e-5
    normalization_type: Literal["RMS", "RMSPre", "LN"] = "LN"
    positional_embedding_type: Literal["rotary", "standard"] = "standard"
    attention_dir: Literal["causal", "bidirectional"] = "bidirectional"
    scales_queries: bool = True
    softmax_in_float32: bool = False
    clamps_fp16: bool = True

    @property
    def _title(self) -> str:
        return "audio encoder"

    @property
    def _sizes(self) -> dict[str, int]:
        return {**super()._sizes, "n_mels": LARGEST, "pooling": LARGEST}

    def _size_problems(self) -> Iterator[str]:
        misfits = [*super()._size_problems()]
        yield from misfits
        if not misfits and self.n_heads * self.d_head != self.d_model:
            yield f"d_model = {self.d_model} is not a multiple of n_heads = {self.n_heads}"


@dataclass(kw_only=True)
class HookedALMConfig(StackConfig):
    """Sizes and variants of a decoder.

    Assignment is validated, since TransformerLens' tools flip flags on a live model.

    Raises:
        ConversionError: a value that the decoder does not implement.
        InputError: an unknown field.
    """

    qk_norm: bool
    d_vocab: int
    """Rows of the embedding and of the unembedding."""
    tie_word_embeddings: bool
    """Whether the unembedding is the embedding."""
    rope_parameters: dict[str, Any]
    """transformers' ``rope_parameters``: ``rope_type``, ``rope_theta`` and scaling constants; empty
    where positions are embedded."""
    layer_types: tuple[LayerType, ...]
    """Type of each block: attends to everything before it, or to a sliding window."""
    sliding_window: int | None
    original_architecture: str
    """Class name in the published config."""
    model_name: str
    """Id or folder the weights came from."""
    embedding_multiplier: float = 1.0
    """Factor on token and audio embeddings alike, before the first block (Granite)."""
    logits_scaling: float = 1.0
    """Divisor of the logits (Granite)."""
    branches: tuple[Branch, ...] = ()
    """Stacks besides the trunk, each with a head of its own (Kimi-Audio)."""
    two_token_streams: bool = False
    """Whether a position has two token ids, whose embeddings are added (Kimi-Audio)."""
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
    default_prepend_bos: bool = False
    """Whether TransformerLens' `induction_loss` begins with a BOS token; nothing here reads it."""
    adapter: str | None = None
    """Folder of the LoRA adapter that was applied on loading."""
    weight_processing: tuple[str, ...] = ()
    """Steps done to the weights; empty while they are the checkpoint's, equal to HF's."""
    final_rms: bool = True
    attn_only: bool = False

    @property
    def _title(self) -> str:
        return f"decoder of {self.model_name!r}"

    @property
    def _sizes(self) -> dict[str, int]:
        return {**super()._sizes, "d_vocab": LARGEST}

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        yield from self._layer_problems()

    def _real_problems(self) -> Iterator[str]:
        yield from super()._real_problems()
        if not is_real(self.embedding_multiplier):
            yield f"embedding_multiplier = {self.embedding_multiplier!r}, expected a number"
        if not (is_real(self.logits_scaling) and self.logits_scaling):
            yield f"logits_scaling = {self.logits_scaling!r}, expected a number other than 0"
        if self.positional_embedding_type == "rotary":
            yield from rope_problems(self.rope_parameters)
        sections = self.rope_parameters.get("mrope_section")
        if sections is not None and not (
            isinstance(sections, list)
            and all(is_size(one) for one in sections)
            and (len(sections), 2 * sum(sections)) == (3, self.d_head)
        ):
            yield (
                f"mrope_section = {sections!r:.60}, expected three numbers that add up to the "
                f"{self.d_head} / 2 frequencies of a head"
            )

    def _layer_problems(self) -> Iterator[str]:
        if len(self.layer_types) != self.n_layers:
            yield f"{len(self.layer_types)} layer_types for {self.n_layers} layers"
        if unknown := [one for one in self.layer_types if one not in get_args(LayerType)]:
            yield f"layer_types {unknown[:3]}, expected {get_args(LayerType)}"
        if "sliding_attention" in self.layer_types and not is_size(self.sliding_window):
            yield (
                f"sliding_window = {self.sliding_window!r}, expected the positions that the "
                "sliding_attention layers see"
            )
        for one in self.branches:
            is_known = type(one.from_layer) is int and one.from_layer in range(self.n_layers)
            if not is_known or not is_size(one.n_layers, MOST_LAYERS):
                yield f"{one.n_layers} layers of branch {one.head!r} from layer {one.from_layer}"

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
        plain = {
            "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
            "attention_multiplier": None, "branches": (), "cross_attention": False,
        }  # fmt: skip
        return [name for name, value in plain.items() if getattr(self, name) != value]

    @property
    def n_params(self) -> int:
        """Number of weights as HookedTransformer's config counts them; see ``n_params_total``.

        Matrices of attention and MLP in the trunk's blocks, keys and values once per query head;
        no embeddings, norms or biases.
        """
        attn, mlp = 4 * self.n_heads * self.d_head, (2 + self.gated_mlp) * self.d_mlp
        return self.n_layers * self.d_model * (attn + mlp)


_FIELD_NAMES = frozenset(f.name for f in fields(HookedALMConfig))


def is_size(value: object, most: int = 2**53) -> bool:
    """Whether a value counts something; ``True`` does not, though Python takes it for 1."""
    return type(value) is int and 1 <= value <= most


def is_real(value: object) -> TypeGuard[float]:
    """Whether a value is a number that float32, in which norms and positions are, can hold."""
    if type(value) is int:
        return abs(value) < 2**63  # a longer one is no number to torch
    return type(value) is float and abs(value) <= torch.finfo(torch.float32).max


def rope_problems(rope: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with transformers' ``rope_parameters`` of a model, in words."""
    kind = rope.get("rope_type")
    if not isinstance(kind, str) or kind not in STATIC_ROPES:
        yield f"rope_type = {kind!r}, expected one of {STATIC_ROPES}"
        return
    misfits = [
        f"{name} = {value!r:.60} of its {kind} rotary positions, expected a number above 0"
        for name in dict.fromkeys((*_ROPE_NEEDS[kind], *_ROPE_TAKES))
        if (value := rope.get(name)) is not None or name in _ROPE_NEEDS[kind]
        if not (is_real(value) and (value > 0 or (value == 0 and name.startswith("mscale"))))
    ]
    part = rope.get("partial_rotary_factor")
    if part is not None and not (is_real(part) and 0 < part <= 1):
        misfits.append(f"partial_rotary_factor = {part!r:.60}, expected a part of each head")
    yield from misfits
    if kind == "llama3" and not misfits and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        yield (
            f"low_freq_factor = {rope['low_freq_factor']} of its llama3 rotary positions, expected "
            f"less than high_freq_factor = {rope['high_freq_factor']}"
        )


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
