"""HookedTransformer's weight processing, in place: the same function, in weights easier to read.

Only what is exact for RMSNorm and rotary positions; the rest refuses. A loaded model is never
processed by itself, because a processed one is no longer bit-identical to Hugging Face:
``cfg.weight_processing`` lists what was done to the weights, and is empty for the checkpoint's own.

Every product is formed in fp32 and rounded once to the parameter's dtype: log-probabilities of a
bf16 model move by about as much as bf16 rounds them. Parameters are replaced, not written to:
references to the old ones, tied or mapped from a file, keep the old values.
"""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..errors import InputError
from ..offload import refuse_offloaded
from .weights import NORM_SCALES, Weights

_BUFFERS = (".attn.mask", ".attn.IGNORE", ".attn.rotary_sin", ".attn.rotary_cos")
"""Ends of the names of buffers in a HookedTransformer's state dict, in which nothing is learned."""


class WeightProcessing(Weights):
    """Mixed into ``HookedALM``; owns nothing."""

    def process_weights_(
        self,
        fold_ln: bool = True,
        center_writing_weights: bool = False,
        center_unembed: bool = True,
        refactor_factored_attn_matrices: bool = False,
        fold_value_biases: bool = True,
    ) -> None:
        """Process the weights in place; log-probabilities change by rounding only.

        Logits move by a constant per position (``center_unembed``). Doing it twice does nothing.

        Args:
            fold_ln: see ``fold_layer_norm``.
            center_writing_weights: refused; HookedTransformer has it on and skips it for RMSNorm.
            center_unembed: see ``center_unembed``.
            refactor_factored_attn_matrices: refused.
            fold_value_biases: see ``fold_value_biases``.

        Raises:
            InputError: a step that would change the function of the model.
        """
        self._refuse(center_writing_weights, refactor_factored_attn_matrices)
        if fold_ln:
            self._fold_into_blocks()
        if fold_ln or center_unembed:
            self._rewrite_unembed(fold=fold_ln, center=center_unembed)
        if fold_value_biases:
            self.fold_value_biases()

    def fold_layer_norm(self) -> None:
        """Move the norms' scales into the weights that read them, and set them to 1.

        ``ln1`` goes into q, k and v, ``ln2`` into gate and up, ``ln_final`` into the unembedding,
        which is untied from the embedding if it was tied. The residual stream, q, k, v, pattern, z
        and ``hook_normalized`` keep their values; q/k norm stays as it is. Sets
        ``cfg.normalization_type`` to RMSPre, as HookedTransformer does.
        """
        self._fold_into_blocks()
        self._rewrite_unembed(fold=True, center=False)

    def center_unembed(self) -> None:
        """Subtract from every row of ``W_U`` its mean over the vocabulary.

        Logits lose a constant per position, which no probability sees; a head's direct effect on a
        logit is then relative to its mean effect on all logits. A tied head is untied.
        """
        self._rewrite_unembed(fold=False, center=True)

    @torch.no_grad()
    def fold_value_biases(self) -> None:
        """Move the value biases, mapped by ``W_O``, into an output bias: ``b_O += sum b_V W_O``.

        Exact because a pattern's rows sum to 1; every query head brings the bias of the kv head it
        reads. ``hook_v`` and ``hook_z`` lose the bias; ``hook_attn_out`` keeps its value, and the
        heads' results add up to it with ``b_O``. A hook that breaks the rows' sum (zeroing parts of
        a pattern, or z) has another effect on a processed model, where the bias stays. Pad rows,
        which attend to nothing, change.
        """
        self._refuse_to_process()
        for block in self.blocks if "v" in self.cfg.attn_bias else ():
            attn = block.attn
            b_V, W_O = _wide(attn.b_V), _wide(attn.W_O)
            b_O = _wide(attn.b_O) + torch.einsum("he,hed->d", b_V, W_O)
            _replace(attn.o_proj, "bias", b_O, like=attn.v_proj.bias)
            _replace(attn.v_proj, "bias", torch.zeros_like(attn.v_proj.bias))
        self._record("fold_value_biases")

    def center_writing_weights(self) -> None:
        """Refuse: only LayerNorm ignores the mean of the residual stream.

        Raises:
            InputError: always.
        """
        raise InputError(
            "centering the writing weights: the model normalises with RMSNorm, which does not "
            "subtract the mean, so that its output would change. Use center_writing_weights=False."
        )

    def refactor_factored_attn_matrices(self) -> None:
        """Refuse: queries and keys of rotary models are rotated between the two factors.

        Raises:
            InputError: always.
        """
        raise InputError(
            "refactoring the attention matrices: the model rotates queries and keys by position, "
            "so that W_Q and W_K cannot be exchanged for other factors of their product. Use "
            "refactor_factored_attn_matrices=False."
        )

    def load_and_process_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        fold_ln: bool = True,
        center_writing_weights: bool = False,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """Load decoder weights in HookedTransformer's format, then ``process_weights_``.

        Args:
            state_dict: names and shapes of ``to_hooked_transformer_state_dict``; processed or not.
                Scales of norms may be missing, as they are after folding, and are 1 then.
            fold_ln: see ``process_weights_``.
            center_writing_weights: refused.
            center_unembed: see ``process_weights_``.
            fold_value_biases: see ``process_weights_``.
            refactor_factored_attn_matrices: refused.

        Raises:
            InputError: a name or shape that does not fit, a weight that is missing, or a bias that
                is not zero where the model has none; the model is then unchanged.
        """
        self._refuse(center_writing_weights, refactor_factored_attn_matrices)
        self._refuse_to_process()
        self._load(self._checked(state_dict))
        self.process_weights_(
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
            fold_value_biases=fold_value_biases,
        )

    def _refuse(self, center_writing_weights: bool, refactor_factored_attn_matrices: bool) -> None:
        if center_writing_weights:
            self.center_writing_weights()
        if refactor_factored_attn_matrices:
            self.refactor_factored_attn_matrices()

    def _checked(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values in our parameters' names and layout, without zeros for biases we do not have."""
        layout, sizes = self.hooked_transformer_layout(), self._sizes()
        problems: list[str] = []
        found: dict[str, Tensor] = {}

        def grouped(name: str) -> str:
            # HookedTransformer leaves the underscore out where no heads are grouped.
            other = name.replace(".W_", "._W_").replace(".b_", "._b_")
            return other if other in layout else name

        given = {
            grouped(name): value
            for name, value in state_dict.items()
            if not name.endswith(_BUFFERS)
        }
        for name, (own, axes) in layout.items():
            theirs = axes.split(" -> ")[1]
            shape = tuple(sizes[axis] for axis in theirs.split())
            default = torch.ones(shape) if name.endswith(NORM_SCALES) else None
            value = given.pop(name, default)
            if value is None:
                problems.append(f"{name} is missing")
            elif tuple(value.shape) != shape:
                problems.append(f"{name} is {list(value.shape)}, expected {list(shape)}")
            elif self._parameter(own) is not None or own.endswith("o_proj.bias"):
                ours, _, theirs = axes.partition(" -> ")
                found[own] = rearrange(value, f"{theirs} -> {ours}")
            elif value.any():
                problems.append(f"{name} is not zero, and the model has no such bias")
        problems += [f"{name} is unknown" for name in given]
        if problems:
            raise InputError(
                f"loading weights in HookedTransformer's format: {len(problems)} do not fit: "
                f"{'; '.join(problems[:5])}. `to_hooked_transformer_state_dict` shows what is "
                "expected; keys and values are per kv head, also while heads are ungrouped."
            )
        return found

    @torch.no_grad()
    def _load(self, found: Mapping[str, Tensor]) -> None:
        for name, value in found.items():
            path, _, attribute = name.rpartition(".")
            module = self._module(path)
            if name.endswith("o_proj.bias") and not value.any():
                module.bias = None
            else:
                weight = module.weight
                # A copy, laid out as `F.linear` reads it fastest, and nobody else's.
                own = value.clone(memory_format=torch.contiguous_format).to(weight.device)
                _replace(module, attribute, own, like=weight)
        norms = [self.ln_final, *(norm for b in self.blocks for norm in (b.ln1, b.ln2))]
        is_folded = all(bool((norm.weight == 1).all()) for norm in norms)
        self.cfg.normalization_type = "RMSPre" if is_folded else "RMS"
        self.cfg.tie_word_embeddings = False
        self.cfg.weight_processing = ("load_and_process_state_dict",)

    @torch.no_grad()
    def _fold_into_blocks(self) -> None:
        self._refuse_to_process()
        for block in self.blocks:
            readers = {
                block.ln1: (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj),
                block.ln2: (block.mlp.gate_proj, block.mlp.up_proj),
            }
            for norm, linears in readers.items():
                for linear in linears:
                    _replace(linear, "weight", _wide(linear.weight) * _wide(norm.weight))
                _replace(norm, "weight", torch.ones_like(norm.weight))

    @torch.no_grad()
    def _rewrite_unembed(self, *, fold: bool, center: bool) -> None:
        """Fold and centre the unembedding at once, so that a bf16 head is rounded once."""
        self._refuse_to_process()
        weight = _wide(self.unembed.weight)
        if fold:
            weight = weight * _wide(self.ln_final.weight).to(weight.device)
            _replace(self.ln_final, "weight", torch.ones_like(self.ln_final.weight))
            self.cfg.normalization_type = "RMSPre"
            self._record("fold_ln")
        if center:
            weight = weight - weight.mean(0, keepdim=True)
            self._record("center_unembed")
        _replace(self.unembed, "weight", weight)
        self.cfg.tie_word_embeddings = False

    def _refuse_to_process(self) -> None:
        self.refuse_beyond_hooked_transformer()
        assert isinstance(self, nn.Module)
        refuse_offloaded(self, "processing the weights")

    def _record(self, step: str) -> None:
        if step not in self.cfg.weight_processing:
            self.cfg.weight_processing = (*self.cfg.weight_processing, step)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _replace(module: Any, name: str, value: Tensor, like: Tensor | None = None) -> None:
    """A new parameter with the dtype of ``like`` (or of the old one), trained or frozen alike."""
    old = getattr(module, name) if like is None else like
    setattr(module, name, nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad))
