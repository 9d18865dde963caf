"""Weights under TransformerLens' names: views, composition scores, and HookedTransformer's format.

The parameters are stored as Hugging Face stores them. Grouped key/value weights appear once per
query head in the properties and in ``tl_parameters``, as HookedTransformer shows them, and once per
key/value head in the state dict, as it stores them.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ..components.lora import updates_of
from ..errors import InputError
from ..hooks import FactoredMatrix

if TYPE_CHECKING:
    from ..config import HookedALMConfig

NORM_SCALES = ("ln1.w", "ln2.w", "ln_final.w")
"""Scales that a state dict leaves out if its ``normalization_type`` is RMSPre."""

_EMBED = {"embed.W_E": ("embed.weight", "vocab d_model -> vocab d_model")}
_BLOCK = {
    "ln1.w": ("ln1.weight", "d_model -> d_model"),
    "attn.W_Q": ("attn.q_proj.weight", "(head d_head) d_model -> head d_model d_head"),
    "attn._W_K": ("attn.k_proj.weight", "(kv_head d_head) d_model -> kv_head d_model d_head"),
    "attn._W_V": ("attn.v_proj.weight", "(kv_head d_head) d_model -> kv_head d_model d_head"),
    "attn.W_O": ("attn.o_proj.weight", "d_model (head d_head) -> head d_head d_model"),
    "attn.b_Q": ("attn.q_proj.bias", "(head d_head) -> head d_head"),
    "attn._b_K": ("attn.k_proj.bias", "(kv_head d_head) -> kv_head d_head"),
    "attn._b_V": ("attn.v_proj.bias", "(kv_head d_head) -> kv_head d_head"),
    "attn.b_O": ("attn.o_proj.bias", "d_model -> d_model"),
    "attn.q_norm.w": ("attn.q_norm.weight", "d_head -> d_head"),
    "attn.k_norm.w": ("attn.k_norm.weight", "d_head -> d_head"),
    "ln2.w": ("ln2.weight", "d_model -> d_model"),
    "mlp.W_gate": ("mlp.gate_proj.weight", "d_mlp d_model -> d_model d_mlp"),
    "mlp.W_in": ("mlp.up_proj.weight", "d_mlp d_model -> d_model d_mlp"),
    "mlp.W_out": ("mlp.down_proj.weight", "d_model d_mlp -> d_mlp d_model"),
    "mlp.b_in": ("mlp.up_proj.bias", "d_mlp -> d_mlp"),
    "mlp.b_out": ("mlp.down_proj.bias", "d_model -> d_model"),
}
_HEAD = {
    "ln_final.w": ("ln_final.weight", "d_model -> d_model"),
    "unembed.W_U": ("unembed.weight", "vocab d_model -> d_model vocab"),
    "unembed.b_U": ("unembed.bias", "vocab -> vocab"),
}
"""HookedTransformer's name -> our parameter, and how its axes move. Absent biases are zeros."""


class BlockWeights:
    """Weights of a stack's blocks, one below the other; mixed into what has ``blocks``."""

    if TYPE_CHECKING:
        blocks: Any

    def _stacked(self, part: str, name: str) -> Tensor:
        found = [getattr(getattr(block, part), name) for block in self.blocks]
        return torch.stack([one.to(found[0].device) for one in found])

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Query projections."""
        return self._stacked("attn", "W_Q")

    @property
    def W_K(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Key projections, one per query head."""
        return self._stacked("attn", "W_K")

    @property
    def W_V(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Value projections, one per query head."""
        return self._stacked("attn", "W_V")

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        """Output projections."""
        return self._stacked("attn", "W_O")

    @property
    def b_Q(self) -> Float[Tensor, "layer head d_head"]:
        """Query biases; zeros where the family has none."""
        return self._stacked("attn", "b_Q")

    @property
    def b_K(self) -> Float[Tensor, "layer head d_head"]:
        """Key biases, one per query head."""
        return self._stacked("attn", "b_K")

    @property
    def b_V(self) -> Float[Tensor, "layer head d_head"]:
        """Value biases, one per query head."""
        return self._stacked("attn", "b_V")

    @property
    def b_O(self) -> Float[Tensor, "layer d_model"]:
        """Output biases; zeros where the blocks have none."""
        return self._stacked("attn", "b_O")

    @property
    def W_gate(self) -> Float[Tensor, "layer d_model d_mlp"]:
        """Gate projections, of gated MLPs alone."""
        return self._stacked("mlp", "W_gate")

    @property
    def W_in(self) -> Float[Tensor, "layer d_model d_mlp"]:
        """Up projections."""
        return self._stacked("mlp", "W_in")

    @property
    def W_out(self) -> Float[Tensor, "layer d_mlp d_model"]:
        """Down projections."""
        return self._stacked("mlp", "W_out")

    @property
    def b_in(self) -> Float[Tensor, "layer d_mlp"]:
        """Biases of the up projections; zeros where the blocks have none."""
        return self._stacked("mlp", "b_in")

    @property
    def b_out(self) -> Float[Tensor, "layer d_model"]:
        """Biases of the down projections; zeros where the blocks have none."""
        return self._stacked("mlp", "b_out")

    @property
    def QK(self) -> FactoredMatrix:
        """Products ``W_Q W_K^T`` of every head: which position attends to which, before rotation.

        The norms' scales are left out: those of ``ln1`` are in it after ``fold_layer_norm``, those
        of q/k norm never.
        """
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """Products ``W_V W_O`` of every head: what is moved from an attended position.

        The scale of ``ln1`` is left out; ``fold_layer_norm`` puts it in.
        """
        return FactoredMatrix(self.W_V, self.W_O)


class Weights(BlockWeights):
    """Mixed into ``HookedALM``; owns nothing."""

    if TYPE_CHECKING:
        cfg: HookedALMConfig
        embed: Any
        unembed: Any
        pos_embed: Any
        ln_final: Any

    @property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:
        """Embedding table."""
        return self.embed.W_E

    @property
    def W_pos(self) -> Float[Tensor, "position d_model"]:
        """Embedding table of positions.

        Raises:
            AttributeError: positions are rotary.
        """
        if self.pos_embed is None:
            raise AttributeError("W_pos: positions are rotary here, and not embedded.")
        return self.pos_embed.W_pos

    @property
    def W_U(self) -> Float[Tensor, "d_model vocab"]:
        """Unembedding."""
        return self.unembed.W_U

    @property
    def b_U(self) -> Float[Tensor, " vocab"]:
        """Zeros: no model of this class has an unembedding bias."""
        return self.unembed.b_U

    @property
    def n_params_total(self) -> int:
        """Number of parameters, those of the audio encoder included; a tied head counts once."""
        assert isinstance(self, nn.Module)
        return sum(parameter.numel() for parameter in self.parameters())

    @torch.no_grad()
    def all_composition_scores(
        self, mode: str
    ) -> Float[Tensor, "layer head later_layer later_head"]:
        """Composition scores: the share of each head's writing that later heads' inputs read.

        ``|L R| / (|L| |R|)`` in Frobenius norms, with ``L = W_V W_O`` of the earlier head and
        ``R`` = ``W_Q W_K^T``, ``W_K W_Q^T`` or ``W_V W_O`` of the later one; 0 where the second
        head is not later. The scale of ``ln1`` is part of every ``W_Q``, ``W_K`` and ``W_V`` here,
        so that folding it changes nothing. Rotation and q/k norm are left out. Computed in fp32.

        Args:
            mode: "Q", "K" or "V".

        Raises:
            InputError: an unknown mode.

        Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
        """
        if mode not in ("Q", "K", "V"):
            raise InputError(
                f"computing composition scores: got mode={mode!r}, expected Q, K or V."
            )

        def read(block: Any, name: str) -> Tensor:
            return getattr(block.attn, name).float() * block.ln1.w.float()[:, None]

        left = [(read(block, "W_V"), block.attn.W_O.float()) for block in self.blocks]
        right = left
        if mode != "V":
            first, second = ("W_Q", "W_K") if mode == "Q" else ("W_K", "W_Q")
            right = [(read(block, first), read(block, second).mT) for block in self.blocks]
        # Norms from d_head-wide triangles: |A B C D| = |R_A (B C) R_D^T| where A = Q_A R_A.
        left_out, left_norm = zip(*((_triangle(a), _norm(a, b)) for a, b in left), strict=True)
        right_in, right_norm = zip(*((_triangle(b.mT), _norm(a, b)) for a, b in right), strict=True)
        n_layers, n_heads = self.cfg.n_layers, self.cfg.n_heads
        scores = left_norm[0].new_zeros(n_layers, n_heads, n_layers, n_heads)
        for early in range(n_layers):
            for late in range(early + 1, n_layers):
                middle = torch.einsum("hed,kdf->hkef", left[early][1], right[late][0])
                through = left_out[early][:, None] @ middle @ right_in[late].mT
                norm = through.flatten(2).norm(dim=-1)
                scores[early, :, late] = norm / left_norm[early][:, None] / right_norm[late]
        return scores

    def tl_parameters(self) -> dict[str, Tensor]:
        """Decoder weights under TransformerLens' names: ``blocks.0.attn.W_Q`` and so on.

        Views of the parameters, but for key and value weights of grouped models, which are repeated
        for every query head, and for absent biases, which are zeros.
        """
        return dict(self._hooked_transformer_tensors(per_query_head=True))

    def to_hooked_transformer_state_dict(self) -> dict[str, Tensor]:
        """Copies of the decoder's weights as HookedTransformer names, shapes and stores them.

        It is the state dict of a HookedTransformer whose config is ``model.cfg`` as it is now:
        keys and values are ``_W_K [kv_head, d_model, d_head]``, ``_W_V``, ``_b_K``, ``_b_V``
        (per query head while heads are ungrouped); after ``fold_layer_norm`` the norms' scales
        are left out. ``transformer_lens.weight_processing.ProcessWeights.process_weights`` takes
        the dict with ``model.cfg``. HookedTransformer's buffers (masks, rotary tables) and the
        audio encoder are not in it.
        """
        is_folded = self.cfg.normalization_type == "RMSPre"
        return {
            name: value.detach().clone(memory_format=torch.contiguous_format)
            for name, value in self._hooked_transformer_tensors(
                per_query_head=self.cfg.ungroup_grouped_query_attention, underscore="_"
            )
            if not (is_folded and name.endswith(NORM_SCALES))
        }

    def _hooked_transformer_tensors(
        self, *, per_query_head: bool, underscore: str = ""
    ) -> Iterator[tuple[str, Tensor]]:
        n_groups = self.cfg.n_heads // self.blocks[0].attn.n_stored_kv_heads
        for name, (own, axes) in self.hooked_transformer_layout().items():
            stored = self._parameter(own)
            if stored is None:
                shape = [self._sizes()[axis] for axis in axes.split(" -> ")[1].split()]
                value = self.embed.weight.new_zeros(shape)
            else:
                value = rearrange(stored, axes, **self._known_sizes(axes))
            if per_query_head and "kv_head" in axes:
                value = value.repeat_interleave(n_groups, 0)
            yield name.replace("._", f".{underscore}"), value

    def hooked_transformer_layout(self) -> dict[str, tuple[str, str]]:
        """HookedTransformer's name of every weight -> our parameter's, and einops' ``ours -> its``.

        Parameters that the model does not have (biases) are listed, too.

        Raises:
            InputError: the decoder multiplies what it reads or writes, or has a second branch.
        """
        self.refuse_beyond_hooked_transformer()
        block = {
            name: rule for name, rule in _BLOCK.items() if self.cfg.qk_norm or "_norm." not in name
        }
        layers = {
            f"blocks.{layer}.{name}": (f"blocks.{layer}.{own}", axes)
            for layer in range(self.cfg.n_layers)
            for name, (own, axes) in block.items()
        }
        return {**_EMBED, **layers, **_HEAD}

    def refuse_beyond_hooked_transformer(self) -> None:
        """Refuse a model that its weights alone do not describe.

        Raises:
            InputError: the config has what HookedTransformer's has not.
        """
        assert isinstance(self, nn.Module)
        if any(updates_of(self)):
            raise InputError(
                f"treating {self.cfg.model_name!r} as a HookedTransformer: its adapter is kept "
                "apart from the weights. Load it merged, with merge_lora=True."
            )
        if beyond := self.cfg.beyond_hooked_transformer:
            raise InputError(
                f"treating {self.cfg.model_name!r} as a HookedTransformer: it has "
                + ", ".join(f"{name} = {getattr(self.cfg, name)}" for name in beyond)
                + ", which weights in that format cannot say. Hooks, caches and sweeps work; "
                "processing and export of the weights do not."
            )

    def _parameter(self, name: str) -> Tensor | None:
        module, _, attribute = name.rpartition(".")
        return getattr(self._module(module), attribute, None)

    def _module(self, path: str) -> Any:
        assert isinstance(self, nn.Module)
        return self.get_submodule(path)

    def _sizes(self) -> dict[str, int]:
        cfg = self.cfg
        return {"head": cfg.n_heads, "kv_head": self.blocks[0].attn.n_stored_kv_heads,
                "d_head": cfg.d_head, "d_model": cfg.d_model, "d_mlp": cfg.d_mlp,
                "vocab": cfg.d_vocab}  # fmt: skip

    def _known_sizes(self, axes: str) -> dict[str, int]:
        return {axis: size for axis, size in self._sizes().items() if axis in axes.split()}


def _triangle(x: Float[Tensor, "head d_model d_head"]) -> Float[Tensor, "head rank d_head"]:
    """Factor ``R`` of ``x = Q R``: as long as ``x`` in every direction."""
    return torch.linalg.qr(x, mode="r").R


def _norm(
    a: Float[Tensor, "head d_model d_head"], b: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, " head"]:
    """Frobenius norm of ``a b``, which is never formed."""
    return (_triangle(a) @ _triangle(b.mT).mT).flatten(1).norm(dim=-1)
