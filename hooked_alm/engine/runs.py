"""Whole runs, recorded; rows that agree with an earlier run on a prefix compute only the rest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..components.rotary import RotaryTables
from ..encoder_rows import EncoderRows
from ..errors import InputError
from ..hooks import Hook, HookPoint, is_hooked
from ..inputs import ALMInput
from ..model import HookedALM
from ..points import hook_name, point_of
from ..turns import in_turn
from .blocks import run_block
from .bundles import Bundle
from .record import Agreement, Record
from .rows import CellRows, RowSets


@dataclass(frozen=True, kw_only=True, eq=False)
class Runs:
    """A batch that ran once."""

    records: list[Record]
    kept: dict[str, Tensor]
    """Activations that were asked for, of the whole batch, by hook name. Pad rows mean nothing."""
    logits: Float[Tensor, "batch pos vocab"] | None = None
    """Logits of every position, if they were asked for."""

    def __getitem__(self, rows: slice) -> "Runs":
        """Some rows; nothing is copied."""
        return self._with(self.records[rows], lambda value: value[rows])

    def repeated(self, n: int) -> "Runs":
        """The runs of a single prompt as those of ``n`` that are the same; nothing is copied."""
        return self._with(self.records * n, lambda value: value.expand(n, *value.shape[1:]))

    def _with(self, records: list[Record], change: Callable[[Tensor], Tensor]) -> "Runs":
        kept = {name: change(value) for name, value in self.kept.items()}
        logits = None if self.logits is None else change(self.logits)
        return Runs(records=records, kept=kept, logits=logits)


class _Branch(NamedTuple):
    """The first ``n_rows`` of a prompt are those of a row of some runs."""

    runs: Runs
    row: int
    n_rows: int

    @property
    def record(self) -> Record:
        return self.runs.records[self.row]


@in_turn
@torch.no_grad()
def record_runs(
    model: HookedALM,
    x: ALMInput,
    keep: Sequence[str] = (),
    *,
    with_logits: bool = False,
    after: Runs | None = None,
    hooks: Sequence[Hook] = (),
) -> Runs:
    """Run a batch once and keep, per row, what its cells need.

    Rows of which half or more agrees with the beginning of an earlier row, or of a row of
    ``after``, reuse what that one computed (rule 5): one clip under several instructions is heard
    once. Their activations differ from those of a whole run by rounding.

    Args:
        model: to run; no hook may be attached.
        x: prompts.
        keep: hook points whose activations are kept besides.
        with_logits: return logits of every position; nothing is shared then.
        after: earlier runs; they serve if they kept the same points.
        hooks: that change the whole run, before anything of it is kept; nothing is shared then.

    Raises:
        InputError: a hook is attached to the model.
    """
    refuse_hooks(model)
    # A prefix can be shared if its rows read no later ones, and if all that is kept has one value
    # per row: scores and patterns have keys of the whole prompt.
    along = tuple(f"{block}." for block in model.path)
    shareable = all(stack.reach == "later rows" for stack in model.path_stacks)
    shareable &= not model.cfg.cross_attention  # nothing of it would be as cheap to compare
    shareable &= all(name.startswith(along) or name == "hook_embed" for name in keep)
    shareable &= (
        not with_logits and not hooks and not any("key_pos" in point_of(name).axes for name in keep)
    )
    if not shareable:
        return _run_whole(model, x, keep, with_logits, hooks=hooks)
    stream = model(x, stop_at_layer=0)
    embedded = _records(model, x, [stream], [], [])  # that know only what enters the first block
    served = after is not None and {*keep} <= {*after.kept}
    parents = _parents(embedded, after.records if after is not None and served else [])
    trunk = [row for row in range(len(x)) if row not in parents]
    if not parents:
        return _run_whole(model, x, keep, False)
    whole = Runs(records=[], kept={})
    if trunk:
        # From its embeddings: encoding some of the clips by themselves would round differently.
        whole = _run_whole(model, x[trunk], keep, False, stream[trunk])
    branches = {}
    for row, (is_here, parent, n_rows) in parents.items():
        runs = whole if is_here or after is None else after
        branches[row] = _Branch(runs, trunk.index(parent) if is_here else parent, n_rows)
    return _joined(model, x, embedded, keep, whole, trunk, branches)


def _parents(
    records: Sequence[Record], earlier: Sequence[Record]
) -> dict[int, tuple[bool, int, int]]:
    """Rows that can branch off: whether off a row of this batch, which one, after how many rows."""
    found: dict[int, tuple[bool, int, int]] = {}
    for row, record in enumerate(records):
        # Of this batch only rows that run whole serve: those of a branch are computed later.
        candidates = [(False, i, other) for i, other in enumerate(earlier)]
        candidates += [(True, i, records[i]) for i in range(row) if i not in found]
        best = (False, -1, 0)
        for is_here, i, other in candidates:
            half = -(-len(record) // 2)
            n = min(len(record), len(other))
            # Token ids first: they are cheap to compare. Clips differ in embeddings alone.
            if n < half or not torch.equal(record.tokens[:half], other.tokens[:half]):
                continue
            # The last row runs anyway: it is where the answer is read.
            n_rows = min(*Agreement.of(record, other), len(record) - 1)
            if n_rows >= half and n_rows > best[2]:
                best = (is_here, i, n_rows)
        if best[2]:
            found[row] = best
    return found


def _joined(
    model: HookedALM,
    x: ALMInput,
    embedded: Sequence[Record],
    keep: Sequence[str],
    whole: Runs,
    trunk: Sequence[int],
    branches: Mapping[int, _Branch],
) -> Runs:
    """Runs of the whole batch: rows that ran whole, and the rest of those that branch off."""
    records = {row: record for row, record in zip(trunk, whole.records, strict=True)}
    seen = _run_rest(model, embedded, keep, branches)
    kept = {}
    for name in keep:
        example = next(iter(branches.values())).runs.kept[name]
        kept[name] = example.new_zeros(*x.shape, *example.shape[2:])
        if trunk:
            kept[name][trunk] = whole.kept[name]
    for row, branch in branches.items():
        record, parent, n = embedded[row], branch.record, branch.n_rows
        record.resid = [
            torch.cat([old[:n], seen[f"resid {depth}"][row].to(old.device)])
            for depth, old in enumerate(parent.resid)
        ]
        for layer, block in enumerate(model.path):
            for old, store, point in (
                (parent.keys, record.keys, "rot_k"),
                (parent.values, record.values, "v"),
            ):
                new = seen[hook_name(point, block)][row].transpose(0, 1)
                store.append(torch.cat([old[layer][:, :n], new], dim=1))
        for name in keep:
            # Rows by their padded places, which differ where the prompts are padded differently.
            before = branch.runs.kept[name][branch.row, parent.where[:n]]
            # ``hook_embed`` fires before the blocks, which are all that ran for the rest.
            rest = embedded[row].resid[0][n:] if name == "hook_embed" else seen[name][row]
            kept[name][row, record.where] = torch.cat([before, rest])
        records[row] = record
    return Runs(records=[records[row] for row in range(len(x))], kept=kept)


def _run_rest(
    model: HookedALM,
    embedded: Sequence[Record],
    keep: Sequence[str],
    branches: Mapping[int, _Branch],
) -> dict[str, dict[int, Tensor]]:
    """Activations of rows behind shared prefixes, all in one pass: name -> batch row -> value."""
    seen: dict[str, dict[int, Tensor]] = {}
    streams = {row: embedded[row].resid[0][branch.n_rows :] for row, branch in branches.items()}
    seen["resid 0"] = streams
    for layer, (block, stack) in enumerate(zip(model.path, model.path_stacks, strict=True)):
        bundles = []
        for row, branch in branches.items():
            keys, values = branch.record.key_values(layer)
            n, record = branch.n_rows, embedded[row]
            rest = CellRows(RowSets([np.arange(n, len(record))], len(record)), np.zeros(1, int))
            bundles.append(Bundle(
                record=record, rows=rest, resid=streams[row], own_rows=rest,
                shared=(keys[:, :n], values[:, :n]), shared_rows=np.arange(n),
            ))  # fmt: skip
        sizes = [len(bundle.rows) for bundle in bundles]

        def see(value: Tensor, hook: HookPoint, sizes: list[int] = sizes) -> None:
            # Every bundle is one branch with a single cell.
            seen[str(hook.name)] = dict(zip(branches, value[0].split(sizes), strict=True))

        names = {name for name in keep if name.startswith(f"{block}.")}
        names |= {hook_name("rot_k", block), hook_name("v", block)}
        with model.hooks(fwd_hooks=[(name, see) for name in sorted(names)]):
            outputs = run_block(model.block(layer), stack, bundles)
        streams = dict(zip(branches, outputs, strict=True))
        seen[f"resid {layer + 1}"] = streams
    return seen


def _run_whole(
    model: HookedALM,
    x: ALMInput,
    keep: Sequence[str],
    with_logits: bool,
    stream: Float[Tensor, "batch pos d_model"] | None = None,
    hooks: Sequence[Hook] = (),
) -> Runs:
    """Records and activations of one forward, not copies of them."""
    resid = model.depth_names()
    keys = [hook_name("k" if model.rotary is None else "rot_k", block) for block in model.path]
    values = [hook_name("v", block) for block in model.path]
    read = [f"cross_attn.{part}" for part in "kv"] if model.cfg.cross_attention else []
    memory = [hook_name(part, block) for block in model.path for part in read]
    seen: dict[str, Tensor] = {}

    def see(value: Tensor, hook: HookPoint) -> None:
        seen[str(hook.name)] = value.detach()

    return_type = "logits" if with_logits else None
    names = {*resid, *keys, *values, *memory, *keep}
    with model.hooks(fwd_hooks=[*hooks, *((name, see) for name in names)]):
        if stream is None:
            logits = model(x, return_type)
        else:
            # The point does not fire in a run that starts behind it.
            seen["hook_embed"] = stream
            logits = model(stream, return_type, start_at_layer=0, inputs=x)
    records = _records(model, x, *([seen[n] for n in some] for some in (resid, keys, values)))
    if memory:
        for row, record in enumerate(records):
            found = iter([seen[name][row].transpose(0, 1) for name in memory])
            record.memory = [*zip(found, found, strict=True)]
    return Runs(
        records=records,
        kept={name: seen[name] for name in keep},
        logits=logits,
    )


def _records(
    model: HookedALM,
    x: ALMInput,
    resid: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
) -> list[Record]:
    """Records of every prompt, from activations of the whole batch ``[batch, pos, *features]``."""
    rotary = None
    if model.rotary is not None:
        rotary = model.rotary(x.position_ids.to(resid[0].device), resid[0].dtype)
    return _made_records(x, resid, keys, values, rotary)


def encoder_records(
    model: HookedALM, rows: EncoderRows, kept: Mapping[str, Tensor]
) -> list[Record]:
    """Records of the encoder's rows, from activations by prompt at ``encoder_names``."""
    resid, keys, values = ([kept[name] for name in names] for names in encoder_names(model))
    records = _made_records(rows.prompts, resid, keys, values, None)
    for record, is_seen in zip(records, rows.is_seen, strict=True):
        record.is_seen = is_seen[record.where.numpy()]
    return records


def encoder_names(model: HookedALM) -> tuple[list[str], list[str], list[str]]:
    """Hook points of an encoder's path that its records are made of: streams, keys and values."""
    keys, values = ([hook_name(part, block) for block in model.path] for part in ("k", "v"))
    return model.depth_names(), keys, values


def _made_records(
    x: ALMInput,
    resid: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    rotary: RotaryTables | None,
) -> list[Record]:
    records = []
    for row in range(len(x)):
        real = x.attention_mask[row].bool().cpu()
        records.append(
            Record(
                where=real.nonzero().flatten(),
                n_pos=x.shape[1],
                tokens=x.tokens[row].cpu()[real],
                position_ids=x.position_ids[..., row, :].cpu()[..., real],
                resid=[_real_rows(value[row], real) for value in resid],
                keys=[_real_rows(value[row], real).transpose(0, 1) for value in keys],
                values=[_real_rows(value[row], real).transpose(0, 1) for value in values],
                rotary=None
                if rotary is None
                else (_real_rows(rotary[0][row], real), _real_rows(rotary[1][row], real)),
            )
        )
    return records


def _real_rows(value: Tensor, real: Bool[Tensor, " pos"]) -> Tensor:
    """Real rows of ``[pos, *features]``, as a view where they are in one piece."""
    first, n = int(real.int().argmax()), int(real.sum())
    return value[first : first + n] if bool(real[first : first + n].all()) else value[real]


def refuse_hooks(model: HookedALM) -> None:
    """Refuse a hooked model: hooks would see the rows that are recomputed, not a whole run.

    Raises:
        InputError: a hook is attached to the model.
    """
    hooked = [name for name, point in model.hook_dict.items() if is_hooked(point)]
    if hooked:
        raise InputError(
            f"sweeping while hooks are attached ({', '.join(hooked[:3])}): the engine recomputes "
            "only the rows that a cell reaches, and hooks would see no more than those. Use "
            "engine='hooks', or `model.reset_hooks()` first."
        )
