"""Stacks of blocks as data, and the way through them to the head that a model is asked about."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .axes import Resid
from .components.attention import AttentionContext
from .components.block import Block
from .errors import InputError
from .hooks import HookPoint, is_hooked
from .points import hook_name
from .spans import Range, as_ranges

if TYPE_CHECKING:
    from .config import HookedALMConfig, StackConfig

StackedT = TypeVar("StackedT", bound="StackedModel")
Reach = Literal["later rows", "own chunk"]
"""Rows that read a row, so that an edit of it reaches them one block up: those behind it (a
decoder), or all of its chunk (an encoder, whose windows are chunks that do not see each other)."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Blocks that run one after the other, and what stands behind them.

    Rows are counted from a prompt's first real position.
    """

    blocks: str
    """Name of the module list."""
    n_layers: int
    norm: str
    """Name of the final norm."""
    unembed: str = ""
    """Name of the unembedding; none where the stack leads to no head, as an encoder's."""
    reads: str | None = None
    """Block whose output the first one reads; None is what the tokens were embedded as."""
    reach: Reach = "later rows"
    chunk: int | None = None
    """Number of rows of a chunk, where an edit reaches its own chunk."""

    def __post_init__(self) -> None:
        """Refuse a reach without its chunk, or a chunk without its reach."""
        if (self.reach == "own chunk") != bool(self.chunk and self.chunk > 0):
            raise InputError(
                f"declaring {self.blocks}: got reach={self.reach!r} and chunk={self.chunk}. "
                "'own chunk' needs a chunk of one row or more, and nothing else has any."
            )

    @property
    def block_names(self) -> tuple[str, ...]:
        """Names of the blocks, first to last."""
        return tuple(f"{self.blocks}.{layer}" for layer in range(self.n_layers))

    def sees(self, rows: Int[Tensor, "..."], keys: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """True where a row reads a key; shapes broadcast. A sliding window is the attention's."""
        if self.reach == "later rows":
            return keys <= rows
        assert self.chunk is not None
        return keys // self.chunk == rows // self.chunk

    def reached(self, ranges: tuple[Range, ...], n_rows: int) -> tuple[Range, ...]:
        """Rows that an edit of some can change further up, of ``n_rows``; ascending, apart."""
        if not ranges:
            return ()
        if self.reach == "later rows":
            # Ranges ascend.
            return ((ranges[0][0], n_rows),)
        assert self.chunk is not None
        size = self.chunk
        chunks = sorted({row // size for start, stop in ranges for row in range(start, stop)})
        return tuple((c * size, min((c + 1) * size, n_rows)) for c in chunks)


def ranges_of(*rows: Int[Tensor, " _row"]) -> tuple[Range, ...]:
    """Ranges of the rows in some tensors, one for each unbroken run of rows."""
    ordered = sorted({row for some in rows for row in some.tolist()})
    if ordered and ordered[-1] - ordered[0] + 1 == len(ordered):  # most often, and many times
        return ((ordered[0], ordered[-1] + 1),)
    return tuple(as_ranges(ordered))


def rows_in(ranges: tuple[Range, ...]) -> Int[Tensor, " row"]:
    """Rows of some ranges, in their order."""
    return torch.cat([torch.arange(*one) for one in ranges] or [torch.arange(0)])


def declared_stacks(cfg: "HookedALMConfig") -> dict[str, Stack]:
    """Stacks of a decoder by the heads that they lead to: its trunk, then its branches."""
    trunk = Stack(blocks="blocks", n_layers=cfg.n_layers, norm="ln_final", unembed="unembed")
    branches = {
        branch.head: Stack(
            blocks=f"{branch.prefix}blocks",
            n_layers=branch.n_layers,
            norm=f"{branch.prefix}ln_final",
            unembed=f"{branch.prefix}unembed",
            reads=trunk.block_names[branch.from_layer],
        )
        for branch in cfg.branches
    }
    return {"text": trunk, **branches}


class StackedModel:
    """Mixed into ``HookedALM``; owns its stacks and the choice of the head."""

    head: str = "text"
    """Name of the head that a run ends in."""
    stacks: Mapping[str, Stack]
    """Stacks by the head that they lead to."""
    part: Stack | None = None
    """The audio encoder's stack, where sweeps are to run along its blocks; None is the way to the
    head."""

    if TYPE_CHECKING:
        cfg: HookedALMConfig
        _encoder_stack: Callable[[], Stack]
        get_submodule: Any

    def towards(self: StackedT, head: str) -> StackedT:
        """A model that shares all weights and hooks with this one, and has another head in use.

        ``model(x)`` then gives that head's logits, and sweeps, paths, lenses and attributions run
        along its blocks: the layers they speak of count along ``path``.

        ``towards("encoder")`` keeps the head, and has sweeps and paths run along the blocks of the
        audio encoder: what they change there is heard, and read off the same logits.

        Raises:
            InputError: the model has no such head, or no encoder with hooked blocks.
        """
        if head == "encoder":
            other = copy(self)
            other.part = self._encoder_stack()
            return other
        if head not in self.stacks:
            *others, last = map(repr, self.stacks)
            raise InputError(
                f"reading head {head!r} of {self.cfg.model_name!r}: it has "
                + (f"{', '.join(others)} and {last}." if others else f"{last} alone.")
                + " 'encoder' stands for the blocks of a hooked audio encoder."
            )
        # Shallow: modules, hooks and ``cfg`` stay the same objects.
        other = copy(self)
        other.head, other.part = head, None
        return other

    @property
    def reader(self: StackedT) -> StackedT:
        """The model with its path to the head in use: this one, unless that is an encoder's."""
        return self if self.part is None else self.towards(self.head)

    def refuse_encoder(self, attempt: str) -> None:
        """Refuse a path through the encoder's blocks, which lead to no unembedding.

        Raises:
            InputError: the path is an encoder's.
        """
        if self.part is not None:
            raise InputError(
                f"{attempt} along {self.part.blocks}: expected blocks that lead to an "
                f"unembedding. Use model.towards({self.head!r}); sweeps and paths do run along an "
                "encoder, and `run_with_cache` shows its activations."
            )

    def refuse_cross_attention(self, attempt: str) -> None:
        """Refuse blocks with cross-attention, whose part would be left out.

        Raises:
            InputError: they have it.
        """
        if self.cfg.cross_attention:
            raise InputError(
                f"{attempt} of {self.cfg.model_name!r}: its blocks have cross-attention, which is "
                "not followed there. `patch` and `path_patch` give exact effects."
            )

    @property
    def path(self) -> tuple[str, ...]:
        """Names of the blocks that lead to the head in use, or of the encoder's, in order."""
        return self._path(self.head) if self.part is None else self.part.block_names

    @property
    def path_stacks(self) -> tuple[Stack, ...]:
        """The stack of every block of ``path``."""
        return tuple(self._stack_of(name) for name in self.path)

    @property
    def path_cfg(self) -> "StackConfig":
        """Config of the blocks of ``path``."""
        return self.block(0).cfg

    def _stack_of(self, block: str) -> Stack:
        every = (*self.stacks.values(), *([] if self.part is None else [self.part]))
        return next(one for one in every if block.startswith(f"{one.blocks}."))

    def depth_names(self) -> list[str]:
        """Hook points of the residual stream at every depth of ``path``: 0, ..., L."""
        names = [hook_name("resid_pre", block) for block in self.path]
        return [*names, hook_name("resid_post", self.path[-1])]

    def _path(self, head: str) -> tuple[str, ...]:
        stack = self.stacks[head]
        for other in self.stacks:
            if stack.reads in self.stacks[other].block_names:
                # This stack starts inside another, whose own way comes before it.
                before = self._path(other)
                return (*before[: before.index(stack.reads) + 1], *stack.block_names)
        return stack.block_names

    def _behind(self, head: str) -> tuple[str, str]:
        """Names of the norm and the unembedding of a head."""
        return self.stacks[head].norm, self.stacks[head].unembed

    def block(self, layer: int) -> Block:
        """A block by its place on the path to the head in use."""
        return cast(Block, self.get_submodule(self.path[layer]))

    def all_blocks(self) -> Iterator[Block]:
        """Blocks of every stack."""
        for stack in self.stacks.values():
            yield from getattr(self, stack.blocks)

    @property
    def head_norm(self) -> Any:
        """The norm before the head in use, or what was put in its place."""
        self.refuse_encoder("reading the stream out")
        return self.get_submodule(self.stacks[self.head].norm)

    @property
    def head_unembed(self) -> Any:
        """The ``Unembed`` of the head in use."""
        self.refuse_encoder("reading the stream out")
        return self.get_submodule(self.stacks[self.head].unembed)

    def _layers(self, start: int | None, stop: int | None) -> range:
        n_layers = len(self._path(self.head))
        for name, layer in (("start_at_layer", start), ("stop_at_layer", stop)):
            is_number = isinstance(layer, int) and not isinstance(layer, bool)
            if layer is not None and not (is_number and -n_layers <= layer <= n_layers):
                raise InputError(
                    f"running some blocks: got {name}={layer!r}, expected a number from "
                    f"{-n_layers} to {n_layers}. The model has {n_layers} blocks."
                )
        # Slicing resolves negative numbers.
        return range(n_layers)[start:stop]

    def _forks(self) -> dict[int, list[tuple[str, ...]]]:
        """Names of modules on each way to another head, by the number of blocks before it."""
        forks: dict[int, list[tuple[str, ...]]] = {}
        for head in self.stacks:
            if head != self.head:
                way = self._path(head)
                # Two ways have the same blocks up to their fork, and none after it.
                own = self._path(self.head)
                n = sum(ours == theirs for ours, theirs in zip(own, way, strict=False))
                forks.setdefault(n, []).append((*way[n:], *self._behind(head)))
        return forks

    def _left_out(self, start: int | None, stop: int | None) -> tuple[str, ...]:
        """Beginnings of the names of hook points that a run of some layers does not reach."""
        layers = self._layers(start, stop)
        parts = {name for head in self.stacks for name in (*self._path(head), *self._behind(head))}
        runs = {*self._path(self.head)[layers.start : layers.stop]}
        if stop is None:
            # A run that goes on to its head takes the forks it passes; one that stops returns the
            # stream.
            passed = {layer + 1 for layer in layers} | ({0} if start is None else set())
            forks = {n: ways for n, ways in self._forks().items() if n in passed}
            runs |= {*self._behind(self.head)}
            runs |= {name for ways in forks.values() for way in ways for name in way}
        before: tuple[str, ...] = ()
        if start is not None:
            # A run that begins at a block embeds nothing; a memory is read by every block.
            embeds = ("hook_tokens", "hook_text_embed", "hook_embed", "hook_pos_embed")
            before = embeds if self.cfg.cross_attention else ("hook_", "audio.")
        return (*before, *(f"{name}." for name in parts - runs))

    def _hooked_ways(self) -> dict[int, list[tuple[str, ...]]]:
        """Ways to other heads on which something is hooked, by fork: only these run."""

        def is_any_hooked(way: tuple[str, ...]) -> bool:
            points = (point for name in way for point in self.get_submodule(name).modules())
            return any(isinstance(point, HookPoint) and is_hooked(point) for point in points)

        return {n: [*filter(is_any_hooked, ways)] for n, ways in self._forks().items()}

    def _run_ways(
        self,
        ways: Sequence[tuple[str, ...]],
        resid: Resid,
        contexts: Mapping[str, AttentionContext],
    ) -> None:
        """Run the ways to other heads from a fork, for their hooks alone: no output is kept."""
        for way in ways:
            *blocks, norm, unembed = way
            stream = resid
            for name in blocks:
                stream = self.get_submodule(name)(stream, contexts[name])
            self.get_submodule(unembed)(self.get_submodule(norm)(stream))
