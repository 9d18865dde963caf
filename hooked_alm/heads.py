"""Which head a model is asked about, and the blocks that lead to it."""

from copy import copy
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from .axes import Resid
from .components.attention import AttentionContext
from .components.block import Block
from .errors import InputError
from .hooks import HookPoint, is_hooked

if TYPE_CHECKING:
    from .config import HookedALMConfig

HeadsT = TypeVar("HeadsT", bound="Heads")
Head = Literal["text", "audio"]
"""What a run ends in. Most models have the text head alone."""

HEADS: dict[Head, tuple[str, str]] = {
    "text": ("ln_final", "unembed"),
    "audio": ("mimo_ln_final", "mimo_unembed"),
}
"""Norm and unembedding of each head."""


class Heads:
    """Mixed into ``HookedALM``; owns the choice of the head alone."""

    head: Head = "text"

    if TYPE_CHECKING:
        cfg: HookedALMConfig
        get_submodule: Any

    def towards(self: HeadsT, head: Head) -> HeadsT:
        """The same model, weights and hooks shared, with another head in use.

        ``model(x)`` then gives that head's logits, and sweeps, paths, lenses and attributions run
        along its blocks: the layers they speak of count along ``path``.

        Raises:
            InputError: the model has no such head.
        """
        if head not in ("text", "audio") or (head == "audio" and not self.cfg.n_mimo_layers):
            raise InputError(
                f"reading head {head!r} of {self.cfg.model_name!r}: it has "
                + ("'text' and 'audio'." if self.cfg.n_mimo_layers else "'text' alone.")
            )
        other = copy(self)
        other.head = head
        return other

    @property
    def path(self) -> tuple[str, ...]:
        """Names of the blocks that lead to the head in use, in order."""
        return self._path(self.head)

    def _path(self, head: Head) -> tuple[str, ...]:
        trunk = [f"blocks.{layer}" for layer in range(self.cfg.n_layers)]
        if head == "text":
            return tuple(trunk)
        assert self.cfg.mimo_from_layer is not None
        branch = [f"mimo_blocks.{layer}" for layer in range(self.cfg.n_mimo_layers)]
        return (*trunk[: self.cfg.mimo_from_layer + 1], *branch)

    def block(self, layer: int) -> Block:
        """A block by its place on the path to the head in use."""
        return cast(Block, self.get_submodule(self.path[layer]))

    @property
    def head_norm(self) -> Any:
        """The ``RMSNorm`` before the head in use, or what was put in its place."""
        return getattr(self, HEADS[self.head][0])

    @property
    def head_unembed(self) -> Any:
        """The ``Unembed`` of the head in use."""
        return getattr(self, HEADS[self.head][1])

    def _layers(self, start: int | None, stop: int | None) -> range:
        n_layers = len(self.path)
        for name, layer in (("start_at_layer", start), ("stop_at_layer", stop)):
            if layer is not None and not -n_layers <= layer <= n_layers:
                raise InputError(
                    f"running some blocks: got {name}={layer}, expected a number from {-n_layers} "
                    f"to {n_layers}. The model has {n_layers} blocks."
                )
        return range(n_layers)[start:stop]

    def _left_out(self, start: int | None, stop: int | None) -> tuple[str, ...]:
        """What the names of points begin with that a run of some layers does not reach."""
        layers = self._layers(start, stop)
        parts = {*self._path("text"), *HEADS["text"]}
        runs = {self.path[layer] for layer in layers}
        runs |= {*HEADS[self.head]} if stop is None else set()
        if self.cfg.n_mimo_layers:
            parts |= {*self._path("audio"), *HEADS["audio"]}
            forks = self.cfg.mimo_from_layer in layers and stop is None
            runs |= {*self._other_branch()} if forks else set()
        before = () if start is None else ("hook_", "audio.")
        return (*before, *(f"{name}." for name in parts - runs))

    def _run_other_branch(self, resid: Resid, context: AttentionContext) -> None:
        """Run what does not lead to the head in use, if any of it is hooked."""
        *blocks, norm, unembed = map(self.get_submodule, self._other_branch())
        points = (point for part in (*blocks, norm, unembed) for point in part.modules())
        if not any(isinstance(point, HookPoint) and is_hooked(point) for point in points):
            return
        for block in blocks:
            resid = block(resid, context)
        unembed(norm(resid))

    def _other_branch(self) -> tuple[str, ...]:
        """Names of what follows the fork on the way to the head that is not in use."""
        assert self.cfg.mimo_from_layer is not None
        other: Head = "audio" if self.head == "text" else "text"
        return (*self._path(other)[self.cfg.mimo_from_layer + 1 :], *HEADS[other])
