"""Hook names, hook points that cost nothing until hooked, and the seam to TransformerLens.

Names follow HookedTransformer (``blocks.{layer}.attn.hook_z``); ours, where it has none, follow the
same grammar. Two kinds of points:

* *inline* points lie on the path of the computation and always fire;
* *on-demand* points (attention scores, pattern, norm scale, per-head results, split inputs) are
  computed on the side when something hooks them. They enter the computation only if a hook returned
  or wrote another value, so that observing never changes the run.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Num
from torch import Tensor
from transformer_lens import ActivationCache as TransformerLensActivationCache
from transformer_lens import FactoredMatrix, HookedRootModule
from transformer_lens.hook_points import HookPoint as TransformerLensHookPoint
from transformer_lens.utilities import Slice

from .display import Shown, Summary, amount
from .errors import HookNameError, InputError
from .points import point_of

__all__ = ["ActivationCache", "FactoredMatrix", "HookPoint", "HookedModule", "is_hooked", "tap"]

NamesFilter = str | Iterable[str] | Callable[[str], bool] | None
_IN_BLOCK = re.compile(r"(blocks)\.\d+\.")
Hook = tuple[str | Callable[[str], bool], Callable[..., Any]]


class HookPoint(TransformerLensHookPoint):
    """TransformerLens' hook point, whose hooks must keep the shape of the value.

    What a hook returned with one row, or one head, would be spread over all of them further on,
    without a word.
    """

    def __call__(self, value: Num[Tensor, "..."]) -> Num[Tensor, "..."]:
        """The value as the hooks left it.

        Raises:
            InputError: something else than a tensor of its shape.
        """
        after: Tensor = super().__call__(value)
        if after is not value and getattr(after, "shape", None) != value.shape:
            found = list(after.shape) if isinstance(after, Tensor) else type(after).__name__
            raise InputError(
                f"hooking {self.name!r}: a hook returned {found}, expected {list(value.shape)}, "
                "the shape that it was given. Return None to leave the value as it is."
            )
        return after


class ActivationCache(Shown, TransformerLensActivationCache):
    """TransformerLens' cache, which says what it holds in a screenful."""

    def _summary(self) -> Summary:
        storages = {
            value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
            for value in self.cache_dict.values()
        }
        alike: dict[tuple[str, ...], int] = {}
        for name, value in self.cache_dict.items():
            # Blocks in a row hold the same points.
            held = (_IN_BLOCK.sub(r"\1.*.", name), f"{[*value.shape]}", _dtype(value))
            alike[held] = alike.get(held, 0) + 1
        size = amount(sum(storages.values()))
        return Summary(
            title=f"ActivationCache: {len(self.cache_dict)} names, {size}",
            columns=("name", "shape", "dtype", "blocks"),
            rows=[(*held, f"{n if '*' in held[0] else ''}") for held, n in alike.items()],
        )


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def is_hooked(point: HookPoint) -> bool:
    """Whether anything is attached to the point, in either direction."""
    return bool(point.fwd_hooks or point.bwd_hooks)


def tap(point: HookPoint, value: Num[Tensor, "..."]) -> Num[Tensor, "..."] | None:
    """Fire an on-demand point and say whether its hooks took the computation over.

    Returns:
        None if the hooks only looked. Otherwise the tensor to compute on with: a hook returned or
        wrote another value, returned one that carries its own gradient, or waits for the gradient
        (which exists only if the value is part of the graph).
    """
    awaits_gradient = bool(point.bwd_hooks) and torch.is_grad_enabled()
    if not awaits_gradient and all(isinstance(h.user_hook, Recorder) for h in point.fwd_hooks):
        point(value)
        return None
    # A copy, not the version counter: edits through .data or under inference_mode leave no trace.
    before = value.detach().clone()
    after = point(value)
    joins_graph = awaits_gradient or value.retains_grad
    joins_graph |= after is not value and after.requires_grad
    return after if joins_graph or not torch.equal(before, after) else None


class Recorder:
    """A hook that stores what passes, and touches nothing."""

    def __init__(
        self,
        store: dict[str, Tensor],
        names: list[str],
        *,
        device: torch.device | str | None,
        pos_slice: Slice,
        remove_batch_dim: bool,
    ) -> None:
        """Store values under each of ``names``."""
        self.store, self.names, self.device = store, names, device
        self.pos_slice, self.remove_batch_dim = pos_slice, remove_batch_dim
        self.copy = True
        """Guard against later in-place edits; `HookedModule.hooks` knows when nobody makes any."""

    def __call__(self, value: Tensor, hook: HookPoint) -> None:
        """Store one activation, or one gradient."""
        kept = value.detach()
        axis = point_of(self.names[0].removesuffix("_grad")).position_axis
        if axis is not None:
            kept = self.pos_slice.apply(kept, dim=axis)
        # A slice would keep the whole activation alive.
        if self.copy or kept.numel() < value.numel():
            kept = kept.clone()
        if self.remove_batch_dim:
            kept = kept.squeeze(0)
        kept = kept.to(self.device)
        for key in self.names:
            self.store[key] = kept


class HookedModule(HookedRootModule):
    """``HookedRootModule`` that refuses hooks which could not fire.

    Adds to TransformerLens' class: errors with suggestions for unknown names, one point under two
    names, position slicing along the right axis for every point, and a default cache without the
    points that HookedTransformer hides behind flags.
    """

    aliases: dict[str, str]
    """Second names: alias -> the point's own name."""

    def setup(self) -> None:
        """Register every hook point under its module path, then the split inputs' 4.3 names."""
        super().setup()
        self.aliases = {}
        for name in self.hook_dict:
            point = point_of(name)
            if point.alias is not None:
                self.aliases[name.removesuffix(point.name) + point.alias] = name
        for alias, name in self.aliases.items():
            self.mod_dict[alias] = self.hook_dict[alias] = self.hook_dict[name]

    def unfireable(self, name: str) -> str | None:
        """Why the point cannot fire on this model, or None. Overridden by the model."""
        return None

    def is_cached_by_default(self, name: str) -> bool:
        """Whether a cache without names keeps the point. The model adds its flags."""
        return point_of(name).flag is None

    def resolve(self, name: str) -> str:
        """The point's own name for a name or alias.

        Raises:
            HookNameError: nothing has that name, or the point cannot fire on this model.
        """
        own = self.aliases.get(name, name)
        if own not in self.hook_dict:
            known = [*self.hook_dict, *self.aliases]
            near = [other for other in known if other.endswith(f".{name}")][:3]
            near = near or difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            raise HookNameError(
                f"looking up hook point {name!r}: this model has none of that name. "
                f"Nearest: {', '.join(near) or 'nothing'}. "
                "`model.hook_dict` lists all."
            )
        if reason := self.unfireable(own):
            raise HookNameError(f"hooking {name!r}: this point cannot fire, because {reason}.")
        return own

    def matching(self, names: NamesFilter) -> list[str]:
        """Own names selected by a filter, in the order of the model.

        Args:
            names: None (what HookedTransformer caches by default, and ours that are free), a name,
                an iterable of names, or a predicate on names.

        Raises:
            HookNameError: a name is unknown or cannot fire, or a predicate matches nothing.
        """
        if isinstance(names, str):
            return [self.resolve(names)]
        points = [name for name in self.hook_dict if name not in self.aliases]
        possible = [name for name in points if not self.unfireable(name)]
        if names is None:
            return [
                name
                for name in possible
                if not name.startswith("audio.") and self.is_cached_by_default(name)
            ]
        if callable(names):
            by_alias = {own for alias, own in self.aliases.items() if names(alias)}
            selected = [name for name in possible if names(name) or name in by_alias]
            if not selected:
                raise HookNameError(
                    f"selecting hook points with {names!r}: it is true for none of the "
                    f"{len(possible)} points. `model.hook_dict` lists them."
                )
            return selected
        wanted = {self.resolve(name) for name in names}
        return [name for name in possible if name in wanted]

    def add_hook(self, name: str | Callable[[str], bool], *args: Any, **kwargs: Any) -> None:
        """Attach a hook until ``reset_hooks``; see ``HookedRootModule.add_hook``."""
        for own in self.matching(name):
            super().add_hook(own, *args, **kwargs)

    @contextmanager
    def hooks(self, *args: Any, **kwargs: Any) -> Iterator["HookedModule"]:
        """Attach hooks for a while; see ``HookedRootModule.hooks``."""
        with super().hooks(*args, **kwargs):
            points = self.hook_dict.values()
            hooks = [h.user_hook for p in points for h in (*p.fwd_hooks, *p.bwd_hooks)]
            recorders = [hook for hook in hooks if isinstance(hook, Recorder)]
            for recorder in recorders:
                recorder.copy = len(recorders) < len(hooks)
            yield self

    def _enable_hook(
        self,
        name: str | Callable[[str], bool],
        hook: Callable[..., Any],
        dir: Literal["fwd", "bwd"],
    ) -> None:
        for own in self.matching(name):
            self.hook_dict[own].add_hook(hook, dir=dir, level=self.context_level)

    def remove_all_hook_fns(
        self,
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Detach hooks; points without any are passed over, which is most of them."""
        for point in self.hook_dict.values():
            if is_hooked(point):
                point.remove_hooks(direction, including_permanent=including_permanent, level=level)

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Any = None,
    ) -> tuple[dict[str, Tensor], list[Hook], list[Hook]]:
        """Hooks that fill ``cache``; they are returned, not attached.

        Differs from TransformerLens in that positions are sliced on the axis they are on.
        """
        store: dict[str, Tensor] = {} if cache is None else cache
        own_names = self.matching(names_filter)
        names = {own: [own] for own in own_names}
        for alias, own in self.aliases.items():
            if own in names:
                names[own].append(alias)

        def recorders(suffix: str) -> list[Hook]:
            return [
                (
                    own,
                    Recorder(
                        store,
                        [key + suffix for key in keys],
                        device=device,
                        pos_slice=Slice.unwrap(pos_slice),
                        remove_batch_dim=remove_batch_dim,
                    ),
                )
                for own, keys in names.items()
            ]

        return store, recorders(""), recorders("_grad") if incl_bwd else []

    def add_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Attach hooks that fill ``cache`` in every run until ``reset_hooks``."""
        store, forward, backward = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, cache
        )
        for name, hook in forward:
            self.add_hook(name, hook)
        for name, hook in backward:
            self.add_hook(name, hook, dir="bwd")
        return store
