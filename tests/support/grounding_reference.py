"""``grounding`` with nothing but transformers' layers and PyTorch hooks: a whole prompt per cell.

Written from the card M-GC: states are read and written where a reference's layers hand them on.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from family_case import Inputs

Site = tuple[str, int]
"""``resid`` and a depth; ``z`` or ``mlp_out`` and a block."""


Cell = tuple[list[int], int | None]
"""Positions, and a head; None is the whole width."""


class PlainPatching:
    """A reference whose layers are laid out as transformers does it."""

    def __init__(self, layers: Sequence[Any], run: Callable[[Inputs], Tensor], d_head: int) -> None:
        self.layers, self.run, self.d_head = layers, run, d_head
        self._known: dict[int, tuple[Inputs, dict[Site, Tensor]]] = {}

    @contextmanager
    def _at(self, site: Site, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Passes what a site holds through a function, for the length of a ``with`` block."""
        kind, index = site

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

        def after(_: Any, args: Any, output: Tensor) -> Tensor:
            return change(output)

        if kind == "resid" and index == 0:
            handle = self.layers[0].register_forward_pre_hook(before, with_kwargs=True)
        elif kind == "resid":
            handle = self.layers[index - 1].register_forward_hook(after)
        elif kind == "z":
            projection = self.layers[index].self_attn.o_proj
            handle = projection.register_forward_pre_hook(before, with_kwargs=True)
        else:
            handle = self.layers[index].mlp.register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def logits(self, inputs: Inputs) -> Tensor:
        """``[row, vocab]`` at the last position, in float64."""
        return self.run(inputs)[:, -1].double()

    @torch.no_grad()
    def states(self, inputs: Inputs) -> dict[Site, Tensor]:
        """What every site of a prompt holds ``[pos, width]``; one forward, made once."""
        if id(inputs) not in self._known:
            kept: dict[Site, Tensor] = {}

            def keep(site: Site, value: Tensor) -> Tensor:
                kept[site] = value[0].clone()
                return value

            blocks = range(len(self.layers))
            sites = [
                *product(("z", "mlp_out"), blocks),
                *(("resid", k) for k in (*blocks, len(blocks))),
            ]
            with ExitStack() as stack:
                for site in sites:
                    stack.enter_context(self._at(site, partial(keep, site)))
                self.run(inputs)
            self._known[id(inputs)] = inputs, kept
        return self._known[id(inputs)][1]

    def patched(self, base: Inputs, donor: Inputs, site: Site, cells: Sequence[Cell]) -> Tensor:
        """Of every cell the base's logits, with the cell taken from the donor; a row for each."""
        values = self.states(donor)[site]

        def change(value: Tensor) -> Tensor:
            changed = value.clone()
            for row, (positions, head) in enumerate(cells):
                width = slice(None)
                if head is not None:
                    width = slice(head * self.d_head, (head + 1) * self.d_head)
                changed[row, positions, width] = values[positions, width]
            return changed

        with self._at(site, change):
            return self.logits({name: _repeated(one, len(cells)) for name, one in base.items()})


def _repeated(value: Any, n: int) -> Any:
    """An argument of one prompt, for so many rows."""
    return value.repeat(n, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value * n
