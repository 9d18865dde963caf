"""Hook names, hook points that cost nothing until hooked, and the seam to TransformerLens.

Names follow HookedTransformer (``blocks.{layer}.attn.hook_z``); ours, where it has none, follow the
same grammar. Two kinds of points:

* *inline* points lie on the path of the computation and always fire;
* *on-demand* points (attention scores, pattern, norm scale, per-head results, split inputs) are
  computed on the side when something hooks them. They enter the computation only if a hook returned
  or wrote another value, so that observing never changes the run.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NoReturn

import torch
from jaxtyping import Num
from torch import Tensor
from transformer_lens import ActivationCache as TransformerLensCache
from transformer_lens import FactoredMatrix, HookedRootModule
from transformer_lens.hook_points import HookPoint as TransformerLensHookPoint
from transformer_lens.utilities import Slice

from .config import check_device
from .display import Shown, Summary, amount
from .errors import HookNameError, InputError, nearest
from .points import ENCODER_ALIASES, hook_name, point_of
from .turns import Turn, restored

__all__ = ["ActivationCache", "FactoredMatrix", "HookPoint", "HookedModule", "is_hooked", "tap"]

NamesFilter = str | Iterable[str] | Callable[[str], bool] | None
_IN_BLOCK = re.compile(r"(blocks)\.\d+\.")
_THEIRS = tuple(ENCODER_ALIASES.values())
Hook = tuple[str | Callable[[str], bool], Callable[..., Any]]


class HookPoint(TransformerLensHookPoint):
    """TransformerLens' hook point, whose hooks must keep shape, dtype and device of the value.

    What a hook returned with one row, or one head, would be spread over all of them further on, and
    another dtype would change the arithmetic of all that follows, without a word.
    """

    def __call__(self, value: Tensor) -> Tensor:
        """The value, or what hooks make of it."""
        # Without hooks, calling a module costs more than many an operation between two points.
        if not (self._forward_hooks or self._forward_pre_hooks):
            if not (self._backward_hooks or self._backward_pre_hooks):
                return value
        found: Tensor = super().__call__(value)
        return found

    def add_hook(
        self,
        hook: Callable[..., Any],
        dir: Literal["fwd", "bwd"] = "fwd",
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Attach a hook; see TransformerLens' ``HookPoint.add_hook``.

        Raises:
            InputError: what cannot be called as ``hook(value, hook=point)``, or a direction that is
                neither "fwd" nor "bwd"; in the run, a hook that returns something else than a
                tensor like the one it was given.
        """
        if dir not in ("fwd", "bwd"):
            raise InputError(f"hooking {self.name!r}: got dir={dir!r}, expected 'fwd' or 'bwd'.")
        if isinstance(hook, Recorder):  # ours, and many
            return self._attach(hook, dir, *args, **kwargs)
        _check_signature(self.name, hook)

        def checked(value: Tensor, hook: Any, user_hook: Callable[..., Any] = hook) -> Any:
            given, after = _described(value), user_hook(value, hook=hook)
            # A gradient may come in a tuple, as PyTorch has it.
            made = after[0] if isinstance(after, tuple) and len(after) == 1 else after
            if made is not None and (found := _described(made)) != given:
                raise InputError(
                    f"hooking {self.name!r}: a hook returned {found}, expected {given}, as it was "
                    "given. Return None to leave the value as it is, or what you made of it with "
                    "`.to(value)`."
                )
            return after

        handle = self._attach(checked, dir, *args, **kwargs)
        handle.user_hook = hook
        return handle

    def _attach(self, *args: Any, **kwargs: Any) -> Any:
        """Attach a hook wholly or, where that is interrupted, not at all."""
        before = {*self._forward_hooks, *self._backward_hooks}
        try:
            return super().add_hook(*args, **kwargs)
        except BaseException:
            for attached, handles in (
                (self._forward_hooks, self.fwd_hooks),
                (self._backward_hooks, self.bwd_hooks),
            ):
                for key in attached.keys() - before:
                    del attached[key]
                handles[:] = [one for one in handles if one.hook.id in attached]
            raise


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{list(value.shape)} {dtype} on {value.device}"


def _check_signature(name: str | None, hook: Any) -> None:
    """Refuse a hook that TransformerLens' way of calling it would find out too late."""
    expected = "expected a function of (value, hook), which are the activation and its point"
    if not callable(hook):
        raise InputError(f"hooking {name!r}: got {type(hook).__name__} {hook!r}, {expected}.")
    try:
        signature = inspect.signature(hook)
    except (TypeError, ValueError):  # some functions written in C have none
        return
    try:
        signature.bind(None, hook=None)
    except TypeError as error:
        raise InputError(
            f"hooking {name!r}: got a function of {signature}, {expected}. It is called as "
            "`fn(value, hook=point)`, so the second must be named hook."
        ) from error


def hook_pairs(hooks: Any, argument: str) -> list[Hook]:
    """The hooks of ``fwd_hooks`` or ``bwd_hooks``, as a list.

    Raises:
        InputError: something else than pairs of a name (or predicate) and a function.
    """
    expected = f"expected {argument}=[(name, function), ...]"
    if isinstance(hooks, str | dict) or not isinstance(hooks, Iterable):
        raise InputError(f"attaching hooks: got {argument}={hooks!r}, {expected}.")
    pairs = list(hooks)
    for pair in pairs:
        name, function = pair if isinstance(pair, tuple | list) and len(pair) == 2 else (None, None)
        if not (isinstance(name, str) or callable(name)) or isinstance(function, str):
            cure = " One pair needs its list, too." if isinstance(pair, str) else ""
            raise InputError(
                f"attaching hooks: got {pair!r} in {argument}, {expected}.{cure} For every block, "
                "give a predicate on names instead of a name."
            )
    return pairs


class ActivationCache(Shown, TransformerLensCache):
    """TransformerLens' cache, which fits a screen; a key that it lacks is answered in words."""

    def __getitem__(self, key: Any) -> Tensor:
        """The activation of a full name, a short one, or ``(short name, layer[, part])``.

        Raises:
            HookNameError: the cache holds none of that name.
        """
        try:
            return super().__getitem__(key)
        # TypeError: what is neither a string nor a tuple of at most three.
        except (KeyError, TypeError) as error:
            name = str(error.args[0] if isinstance(error, KeyError) else key)
            points = getattr(self.model, "hook_dict", ())
            reason = (
                "the run did not keep it. Add it to names_filter."
                if name in points
                else f"there is none of that name. Nearest: {nearest(name, self.cache_dict)}. "
                "`cache.keys()` lists all."
            )
            raise HookNameError(f"looking up {key!r} in the cache: {reason}") from None

    def _ensure_head_results(self) -> bool:
        """What every head writes, computed where its block's weights are."""
        if getattr(self.model, "is_spread", False):
            for layer, block in enumerate(self.model.blocks):
                name = hook_name("result", f"blocks.{layer}")
                z = self.cache_dict.get(hook_name("z", f"blocks.{layer}"))
                if name not in self.cache_dict and z is not None:
                    W_O = block.attn.W_O
                    result = torch.einsum("...hd,hdm->...hm", z.to(W_O.device), W_O)
                    self.cache_dict[name] = result.to(z.device)
        return bool(super()._ensure_head_results())

    @property
    def _is_crossed(self) -> bool:
        cfg = getattr(self.model, "cfg", None)
        return bool(getattr(cfg, "cross_attention", False))

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: Any = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """Outputs that add up to a stream; see TransformerLens' method.

        What cross-attention writes (``0_cross_attn_out``, ...) stands behind its block's attention.

        Raises:
            InputError: the norm of an MLP's input, where there is cross-attention before it.
        """
        apply_here = apply_ln and not self._is_crossed
        parts, labels = super().decompose_resid(
            layer, mlp_input, mode, apply_here, pos_slice, incl_embeds, return_labels=True
        )
        if self._is_crossed:
            if apply_ln and mlp_input:
                self._refuse_crossed("norming what an MLP reads", "the stream, apply_ln=False")
            slices = pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)
            every, names = [], []
            for part, label in zip(parts, labels, strict=True):
                every.append(part)
                names.append(label)
                if label.endswith("_attn_out"):
                    block = label.removesuffix("_attn_out")
                    written = self[hook_name("cross_attn_out", f"blocks.{block}")]
                    every.append(slices.apply(written, dim=-2))
                    names.append(f"{block}_cross_attn_out")
            parts, labels = torch.stack(every), names
            if apply_ln:
                parts = self.apply_ln_to_stack(parts, layer, pos_slice=pos_slice)
        return (parts, labels) if return_labels else parts

    def accumulated_resid(self, *args: Any, **kwargs: Any) -> Any:
        """The stream at every layer; see TransformerLens' method.

        Raises:
            InputError: what an MLP reads, where there is cross-attention before it.
        """
        if self._is_crossed and (kwargs.get("mlp_input") or args[4:5] == (True,)):
            self._refuse_crossed("accumulating what an MLP reads", "hook_resid_mid_cross")
        return super().accumulated_resid(*args, **kwargs)

    def get_full_resid_decomposition(self, *args: Any, **kwargs: Any) -> Any:
        """Heads, neurons and biases that add up to a stream; see TransformerLens' method.

        Raises:
            InputError: the blocks have cross-attention, whose heads it would leave out.
        """
        if self._is_crossed:
            self._refuse_crossed("decomposing a stream into heads and neurons", "decompose_resid")
        return super().get_full_resid_decomposition(*args, **kwargs)

    def _refuse_crossed(self, attempt: str, instead: str) -> NoReturn:
        raise InputError(
            f"{attempt}: the blocks have cross-attention, which TransformerLens knows nothing of, "
            f"and would leave out. Use {instead}."
        )

    def to(self, device: torch.device | str) -> "ActivationCache":
        """The same cache, its activations moved to another device.

        Raises:
            InputError: there is no such device.
        """
        check_device("moving a cache to", device)
        super().to(device)
        return self

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

    def __init__(self) -> None:
        super().__init__()
        self.turn = Turn()
        """Held by the thread that runs the model; `with model.turn` keeps several runs together."""

    def setup(self) -> None:
        """Register every hook point under its module path, then TransformerLens' 4.3 names."""
        super().setup()
        self.aliases = {}
        for name in self.hook_dict:
            point = point_of(name)
            if point.alias is not None:
                self.aliases[name.removesuffix(point.name) + point.alias] = name
        for ours, theirs in ENCODER_ALIASES.items():
            both = [*((name, name) for name in self.hook_dict), *self.aliases.items()]
            inside = [(name, own) for name, own in both if name.startswith(ours)]
            self.aliases |= {theirs + name.removeprefix(ours): own for name, own in inside}
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
            InputError: what is no string.
        """
        if not isinstance(name, str):
            raise InputError(
                f"looking up a hook point: got {type(name).__name__} {name!r}, expected a name."
            )
        own = self.aliases.get(name, name)
        if own not in self.hook_dict:
            if re.search(r"[*?\[]", name):
                raise HookNameError(
                    f"looking up hook point {name!r}: names are no patterns. Several are selected "
                    f"by a function, `lambda name: fnmatch.fnmatch(name, {name!r})`, or by a list."
                )
            near = [other for other in self.hook_dict if other.endswith(f".{name}")]
            near = sorted(near, key=lambda other: not other.startswith("blocks."))[:3]
            raise HookNameError(
                f"looking up hook point {name!r}: this model has none of that name. "
                f"Nearest: {', '.join(near) or nearest(name, self.hook_dict)}. "
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
            InputError: a filter that is none of these.
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
            # Not by what TransformerLens calls an encoder: `not name.startswith("audio.")` would
            # mean its points.
            aliases = ((a, own) for a, own in self.aliases.items() if not a.startswith(_THEIRS))
            by_alias = {own for alias, own in aliases if names(alias)}
            selected = [name for name in possible if names(name) or name in by_alias]
            if not selected:
                raise HookNameError(
                    f"selecting hook points with {names!r}: it is true for none of the "
                    f"{len(possible)} points. `model.hook_dict` lists them."
                )
            return selected
        if not isinstance(names, Iterable):
            raise InputError(
                f"selecting hook points with {type(names).__name__} {names!r}: expected a name, "
                "names, a predicate on names, or None."
            )
        wanted = {self.resolve(name) for name in names}
        return [name for name in possible if name in wanted]

    def add_hook(self, name: str | Callable[[str], bool], *args: Any, **kwargs: Any) -> None:
        """Attach a hook until ``reset_hooks``; see ``HookedRootModule.add_hook``."""
        with self.turn:
            for own in self.matching(name):
                super().add_hook(own, *args, **kwargs)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Iterable[Hook] = (),
        bwd_hooks: Iterable[Hook] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator["HookedModule"]:
        """Attach hooks for a while; see ``HookedRootModule.hooks``.

        Raises:
            InputError: something else than pairs of a name and a hook, or a model that another
                thread keeps hooked.
            HookNameError: a name that matches nothing or cannot fire.
        """
        directions: dict[Literal["fwd", "bwd"], list[Hook]] = {
            "fwd": hook_pairs(fwd_hooks, "fwd_hooks"),
            "bwd": hook_pairs(bwd_hooks, "bwd_hooks"),
        }
        with self.turn:
            level = self.turn.n_blocks + 1

            def detach() -> None:
                if reset_hooks_end:
                    self.reset_hooks(clear_contexts, level=level)
                self.turn.n_blocks = level - 1

            with restored(detach):
                self.turn.n_blocks = level
                for direction, pairs in directions.items():
                    for name, hook in pairs:
                        for own in self.matching(name):
                            self.hook_dict[own].add_hook(hook, dir=direction, level=level)
                points = self.hook_dict.values()
                hooks = [h.user_hook for p in points for h in (*p.fwd_hooks, *p.bwd_hooks)]
                recorders = [hook for hook in hooks if isinstance(hook, Recorder)]
                for recorder in recorders:
                    recorder.copy = len(recorders) < len(hooks)
                yield self

    def remove_all_hook_fns(
        self,
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Detach hooks; points without any are passed over, which is most of them."""
        with self.turn:
            for point in filter(is_hooked, self.hook_dict.values()):
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
        check_device("caching on", device)
        store: dict[str, Tensor] = {} if cache is None else cache
        if isinstance(names_filter, Iterable) and not isinstance(names_filter, str):
            names_filter = [*names_filter]
        asked = [names_filter] if isinstance(names_filter, str) else names_filter
        named = {*asked} if isinstance(asked, list) else set()
        names = {own: [own] for own in self.matching(names_filter)}
        for alias, own in self.aliases.items():
            if own in names and (alias in named or not alias.startswith(_THEIRS)):
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
