"""A base batch, its donor and a metric: what the cells of a sweep are measured with."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ...encoder_rows import EncoderRows
from ...engine.cells import Edits, Given, Marks, hooks_of
from ...engine.groups import Finals
from ...engine.record import MappedRows, Record, on_device
from ...engine.runs import Runs, encoder_names, encoder_records, record_runs
from ...engine.sweep import observe, sweep
from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM
from ...offload import home_of
from ...points import ENCODER, hook_name
from ...precision import head_in_float32, in_float32
from ..activations.selection import kept_points
from ..dictionary.splice import RowEdit, Splice, SpliceHook, applied, spliced_rows
from .metrics import Metric, OnLogits, Reference, with_ids
from .null_cells import with_null_cells
from .options import Engine, Precision
from .results import PatchResult
from .run_pair import RunPair

CHUNK_BYTES = 2**28
"""Bytes of logits over the whole vocabulary that are held at once."""
HEARD_BYTES = 2**27
"""Bytes of embeddings, of cells of the encoder, that wait to run through the decoder together."""
MEMORY_BYTES = 2**24
"""Bytes of memories that the decoder reads together; every block makes keys and values as large.
On a CPU, 24 heads of Whisper tiny's encoder take 7.2 s so, and 7.5 to 8.7 with eight times more."""


class Measurement:
    """Runs base and donor once, and any number of cells against them.

    ``fast`` computes the rows that cells reach; ``hooks`` runs the model anew for every cell of a
    batch, with forward hooks, and is here to be checked against.
    """

    def __init__(
        self,
        model: HookedALM,
        base: ALMInput,
        donor: ALMInput | None,
        metric: Metric | OnLogits,
        *,
        donor_model: HookedALM | None = None,
        engine: Engine = "fast",
        keep: Sequence[str] = (),
        keep_of_donor: Sequence[str] = (),
        max_bytes: int | None = None,
        splice: Splice | None = None,
        runs: RunPair | None = None,
    ) -> None:
        """Run base and donor, keeping activations by hook name; another model may run the donor.

        Neither runs where they are among ``runs``.

        Raises:
            InputError: an unknown engine, hooks or splices that the fast one cannot serve, or what
                is no metric of these rows and this vocabulary.
        """
        if engine not in ("fast", "hooks"):
            raise InputError(f"choosing an engine: got {engine!r}, expected 'fast' or 'hooks'.")
        metric = _checked_metric(model, metric, len(base))
        self.reader = model.reader
        self.model, self.metric, self.engine, self.max_bytes = model, metric, engine, max_bytes
        self.base, self.donor, self.splice = base, donor, splice
        self._spliced_depths = self._depths_of_splice() if engine == "fast" else {}
        if engine == "fast" and donor is not None:
            keep = sorted({*keep, *keep_of_donor})  # so that the donor can share the base's prefix
        self.donor_model = model if donor_model is None else donor_model
        refuse_other_shape(model, self.donor_model)
        if model.part is not None and engine == "fast":
            keep = sorted({*keep, *(name for some in encoder_names(model) for name in some)})
        is_inside = model.part is not None or any(name.startswith(ENCODER) for name in keep)
        self.encoder_rows = model.encoder_rows(base) if is_inside else None
        if runs is not None:
            runs.check(keep_of_donor)
            self.base_runs, self.donor_runs = runs
            return
        self.base_runs = self._run(model, base, keep)
        # What another model has made of the same prefix is something else.
        after = self.base_runs if self.donor_model is model else None
        self.donor_runs = None
        if donor is not None:
            self.donor_runs = self._run(self.donor_model, donor, keep_of_donor, after)

    def _run(
        self, model: HookedALM, x: ALMInput, keep: Sequence[str], after: Runs | None = None
    ) -> Runs:
        """Runs to the head; activations of the encoder by prompt, as its rows have them."""
        rows = self.encoder_rows
        if rows is not None and x is not self.base:
            rows = model.encoder_rows(x)
        if self.engine == "fast":
            with_logits = isinstance(self.metric, OnLogits)
            runs = record_runs(
                model.reader, x, keep, with_logits=with_logits, after=after,
                hooks=self.splice_hooks(model.reader, x),
            )  # fmt: skip
        else:
            with self._head_of(model), model.hooks(fwd_hooks=self.splice_hooks(model, x)):
                logits, kept = model.run_with_cache(
                    x, names_filter=list(keep), return_cache_object=False
                )
            runs = Runs(records=[], kept=kept, logits=logits)
        return runs if rows is None else replace(runs, kept=rows.kept(runs.kept))

    def _head_of(self, model: HookedALM) -> AbstractContextManager[None]:
        """Logits of whole runs as ``of_stream`` has them, within the context."""
        is_whole = isinstance(self.metric, OnLogits)
        return nullcontext() if is_whole else head_in_float32(model.reader)

    def splice_hooks(self, model: HookedALM, x: ALMInput) -> list[SpliceHook]:
        """Hooks of the splice in a run of some prompts; none where nothing is spliced."""
        return [] if self.splice is None else self.splice.hooks(model, x)

    def _depths_of_splice(self) -> dict[int, RowEdit]:
        """Edits of the stream along the path, by depth; what is below the path needs none.

        Raises:
            InputError: a splice at another point.
        """
        edits = {} if self.splice is None else self.splice.edits
        depths = {hook_name("resid_post", b): d for d, b in enumerate(self.model.path, start=1)}
        named = {kept_points(self.reader, name)[0].name: edit for name, edit in edits.items()}
        is_decoder = self.model.part is None
        is_below = {name: is_decoder and name.startswith(ENCODER) for name in named}
        if wrong := [name for name in named if name not in depths and not is_below[name]]:
            raise InputError(
                f"splicing {', '.join(wrong)} under a sweep of {self.model.path[0]} and on: "
                "expected resid_post of these blocks, or of a decoder's sweep points of its "
                "encoder. Take engine='hooks', which runs everything anew."
            )
        return {depths[name]: edit for name, edit in named.items() if not is_below[name]}

    @cached_property
    def records(self) -> list[Record]:
        """Records of the base along the model's path."""
        records = self.base_runs.records
        masks: Tensor | None = None
        if self.model.part is not None:
            assert self.encoder_rows is not None
            records = encoder_records(self.model, self.encoder_rows, self.base_runs.kept)
            masks = self.encoder_rows.prompts.spans.mask("audio")
        elif self.splice is not None:
            masks = spliced_rows(self.base, self.splice.spans)
        for depth, edit in self._spliced_depths.items():
            assert masks is not None
            for record, mask in zip(records, masks, strict=True):
                is_mapped = mask[record.where].numpy()
                record.maps[depth] = MappedRows(is_mapped, partial(applied, edit=edit))
        return records

    @cached_property
    def base_values(self) -> Float[Tensor, " batch *label"]:
        """The metric of the unpatched runs."""
        return self._values_of_runs(self.model, self.base, self.base_runs)

    @cached_property
    def donor_values(self) -> Float[Tensor, " batch *label"]:
        """The metric of the donor's runs; NaN where the donor is none."""
        if self.donor is None or self.donor_runs is None:
            return torch.full_like(self.base_values, torch.nan)
        return self._values_of_runs(self.donor_model, self.donor, self.donor_runs)

    @torch.no_grad()
    def values(
        self, n_cells: int, marks: Sequence[Marks], only: Int[np.ndarray, " cell"] | None = None
    ) -> Float[Tensor, "cell batch *label"]:
        """The metric in every cell; what is not edited keeps the base's value.

        Args:
            n_cells: number of cells, each of all rows of the batch.
            marks: edits of row ``r`` of cell ``c``, and looks there, have the number
                ``c * n_rows + r``.
            only: cells to measure, where not all of them; the values are theirs, in their order.
        """
        n_rows = len(self.base)
        chosen = np.arange(n_cells) if only is None else only
        found = self.base_values.expand(len(chosen), *self.base_values.shape).clone()
        place = np.full(n_cells, -1)
        place[chosen] = np.arange(len(chosen))
        if self.engine == "hooks":
            spliced = self.splice_hooks(self.model, self.base)
            for i, cell in enumerate(chosen.tolist()):
                mine = range(cell * n_rows, (cell + 1) * n_rows)
                with self._head_of(self.model):
                    logits = self.model.run_with_hooks(
                        self.base, fwd_hooks=[*spliced, *self._hooks_of(marks, mine)]
                    )
                edited = np.unique(np.concatenate([
                    m.cells[(m.cells >= mine.start) & (m.cells < mine.stop)] % n_rows
                    for m in marks if isinstance(m, Edits)
                ] or [np.zeros(0, int)]))  # fmt: skip
                found[i, edited] = self._of_logits(self.base, logits)[edited]
            return found
        kept = None if only is None else (only[:, None] * n_rows + np.arange(n_rows)).ravel()
        if self.model.part is None:
            finals = self._read(marks, kept)
        elif self.model.cfg.cross_attention:
            finals = self._reread(marks, kept)
        else:
            finals = chain.from_iterable(map(self._read, self._heard(marks, kept)))
        for done in finals:
            where = on_device(place[done.cells // n_rows], found)
            found[where, done.row] = self.of_stream(done.resid, done.row).to(found)
        return found

    def _read(
        self, marks: Sequence[Marks], only: Int[np.ndarray, " cell"] | None = None
    ) -> Iterator[Finals]:
        """Cells of edits on the way to the head, at the rows that the metric reads."""
        records = self.records if self.model.part is None else self.base_runs.records
        return sweep(
            self.reader, records, marks, self._rows_read, only=only, max_bytes=self.max_bytes
        )

    @cached_property
    def _rows_read(self) -> list[Int[np.ndarray, " _read"]]:
        """Rows of every prompt that the metric reads."""
        rows = zip(self.base_runs.records, self.readouts(self.base, self.base_runs), strict=True)
        is_whole = isinstance(self.metric, OnLogits)
        return [np.arange(len(record)) if is_whole else some for record, some in rows]

    def _reread(
        self, marks: Sequence[Marks], only: Int[np.ndarray, " cell"] | None
    ) -> Iterator[Finals]:
        """Cells of edits in an encoder that cross-attention reads: all of the decoder runs."""
        assert self.encoder_rows is not None
        every = [np.arange(len(record)) for record in self.records]
        for done in sweep(
            self.model, self.records, marks, every, only=only, max_bytes=self.max_bytes
        ):
            memory = heard_as(self.reader, self.base, self.encoder_rows, done.row, done.resid)
            positions = self.base_runs.records[done.row].where.numpy()[self._rows_read[done.row]]
            n = max(MEMORY_BYTES // memory[0].nbytes, 1)
            for start in range(0, len(memory), n):
                some = memory[start : start + n]
                x = replace(self.base[[done.row] * len(some)], memory=some)
                resid = self.reader(x, stop_at_layer=len(self.reader.path))
                yield Finals(
                    row=done.row, cells=done.cells[start : start + n],
                    resid=resid[:, on_device(positions, resid)],
                )  # fmt: skip

    def _heard(
        self, marks: Sequence[Marks], only: Int[np.ndarray, " cell"] | None
    ) -> Iterator[list[Edits]]:
        """What is heard in cells of edits in the encoder, as edits of what enters the decoder."""
        assert self.encoder_rows is not None
        read = [np.arange(len(record)) for record in self.records]
        waiting, n_bytes = list[Edits](), 0
        for done in sweep(
            self.model, self.records, marks, read, only=only, max_bytes=self.max_bytes
        ):
            stream = heard_as(self.reader, self.base, self.encoder_rows, done.row, done.resid)
            positions = self.base.spans.heard[done.row].nonzero().flatten().numpy()
            values = stream[:, on_device(positions, stream)].flatten(0, 1)
            waiting.append(Edits(
                site="resid_pre", layer=0, cells=np.repeat(done.cells, len(positions)),
                positions=np.tile(positions, len(done.cells)), write=Given(values),
            ))  # fmt: skip
            n_bytes += values.nbytes
            # Few cells of the encoder fit into memory at a time, and many of the decoder.
            if n_bytes > HEARD_BYTES:
                yield waiting
                waiting, n_bytes = [], 0
        if waiting:
            yield waiting

    def _hooks_of(self, marks: Sequence[Marks], cells: range) -> list[tuple[str, Any]]:
        """Forward hooks that apply some cells."""
        rows = None if self.model.part is None else self.encoder_rows
        return hooks_of(marks, cells, self.model.path, rows)

    def swept(
        self, n_cells: int, marks: Sequence[Marks]
    ) -> tuple[Float[Tensor, "cell batch *label"], Float[Tensor, " batch *label"] | None]:
        """The metric in every cell, and its noise: what rounding does to cells without a change.

        The noise is the root mean square over a few null cells, or None where there is none worth
        stating: in the loop of whole runs, and in fp32.
        """
        is_low = self.model.cfg.dtype in (torch.bfloat16, torch.float16)
        if self.engine == "hooks" or not is_low:
            return self.values(n_cells, marks), None
        every = with_null_cells(marks, n_cells, self.records)
        found = self.values(every.n_cells, every.marks)
        moved = (found[on_device(every.null, found)] - self.base_values).double() ** 2
        edited = on_device(every.is_edited, moved)
        edited = edited.reshape(*edited.shape, *[1] * (moved.ndim - 2))
        noise = ((moved * edited).sum(0) / edited.sum(0)).sqrt()
        return found[on_device(every.cells, found)], noise

    @torch.no_grad()
    def observed(self, marks: Sequence[Marks], layer: int) -> Iterator[Int[np.ndarray, " seen"]]:
        """Run cells up to a block, for the looks at them: yields those whose looks hold values."""
        if self.engine == "fast":
            yield from observe(self.model, self.records, marks, layer, max_bytes=self.max_bytes)
            return
        # A run that stops inside the encoder is none.
        stop = layer + 1 if self.model.part is None else None
        n_rows = len(self.base)
        for cell in np.unique(np.concatenate([m.cells // n_rows for m in marks])).tolist():
            mine = range(cell * n_rows, (cell + 1) * n_rows)
            hooks = self._hooks_of(marks, mine)
            self.model.run_with_hooks(self.base, stop_at_layer=stop, fwd_hooks=hooks)
            yield np.array(mine)

    def result(
        self,
        axes: Mapping[str, tuple[Any, ...]],
        values: Tensor,
        noise: Tensor | None = None,
        **about: Any,
    ) -> PatchResult:
        """The values of ``values`` under labelled axes, in their order.

        Args:
            axes: axes of the cells; examples and labels are added.
            values: ``[cell, batch, *label]``.
            noise: ``[batch, *label]``, see ``swept``.
            about: ``site``, ``mode`` and what else a ``PatchResult`` says of itself.
        """
        every = {**axes, "example": tuple(range(len(self.base)))}
        if values.ndim == 3:
            every["label"] = getattr(self.metric, "names", None) or tuple(range(values.shape[2]))

        def array(tensor: Tensor) -> np.ndarray:
            return tensor.double().cpu().numpy()

        return PatchResult(
            axes=every,
            values=array(values).reshape([len(ticks) for ticks in every.values()]),
            base=array(self.base_values),
            donor=array(self.donor_values),
            noise=None if noise is None else array(noise),
            engine=self.engine,
            **about,
        )

    @torch.no_grad()
    def _values_of_runs(
        self, model: HookedALM, x: ALMInput, runs: Runs
    ) -> Float[Tensor, " batch *label"]:
        if runs.logits is not None:
            return self._of_logits(x, runs.logits)
        rows = self.readouts(x, runs)
        streams = [r.final(at) for r, at in zip(runs.records, rows, strict=True)]
        return torch.cat([self.of_stream(one[None], row, model) for row, one in enumerate(streams)])

    def _of_logits(self, x: ALMInput, logits: Tensor) -> Float[Tensor, " batch *label"]:
        """Metric of whole logits ``[batch, pos, vocab]``."""
        if isinstance(self.metric, OnLogits):
            found = torch.as_tensor(self.metric.function(logits))
            if found.ndim == 0 and len(logits) == 1:
                found = found[None]
            if found.ndim not in (1, 2) or len(found) != len(logits):
                raise InputError(
                    f"measuring a batch of {len(logits)}: the metric returned shape "
                    f"{tuple(found.shape)}, expected [batch] or [batch, label]. One value per row: "
                    "results keep examples apart."
                )
            return found.float()
        rows = [logits[row, at] for row, at in enumerate(_readout_positions(x))]
        return torch.stack(
            [
                self._score(one[self._tokens(row)].float()[None], row)[0]
                for row, one in enumerate(rows)
            ]
        )

    def of_stream(
        self, resid: Float[Tensor, "cell read d_model"], row: int, model: HookedALM | None = None
    ) -> Float[Tensor, " cell *label"]:
        """Metric of cells of one row, from the stream after the last block at the rows read.

        In fp32, also where the model is not: logits near 10 have steps of 1/16 in bf16, in which
        effects and their noise would vanish. A function of whole logits has the model's own.
        ``model`` is the one whose norm and unembedding read it; None is the base's.
        """
        model = self.reader if model is None else model.reader
        if isinstance(self.metric, OnLogits):
            where = self.base_runs.records[row].where
            found = []
            for one in resid:
                assert self.base_runs.logits is not None
                logits = self.base_runs.logits[row].clone()
                logits[where] = model.head_unembed(model.head_norm(one[None]))[0]
                found.append(self._of_logits(self.base, logits[None])[0])
            return torch.stack(found)
        weight = self._directions(row, model)
        n = max(CHUNK_BYTES // (4 * len(weight)), 1)
        return torch.cat(
            [self._score(_logits(model, part, weight), row) for part in resid[:, -1].split(n)]
        )

    def _score(
        self, logits: Float[Tensor, "cell token"], row: int
    ) -> Float[Tensor, " cell *label"]:
        assert not isinstance(self.metric, OnLogits)
        return self.metric(logits, row, _Unpatched(self, row))

    def readout_logits(
        self, model: HookedALM, x: ALMInput, runs: Runs, row: int
    ) -> Float[Tensor, " token"]:
        """Readout logits of an unpatched run of one row, over the metric's tokens."""
        if runs.logits is not None:
            return runs.logits[row, _readout_positions(x)[row]][self._tokens(row)].float()
        stream = runs.records[row].final(self.readouts(x, runs)[row])
        return _logits(model.reader, stream, self._directions(row, model.reader))[0]

    def _tokens(self, row: int) -> slice | Int[Tensor, " token"]:
        assert not isinstance(self.metric, OnLogits)
        tokens = self.metric.tokens(row)
        if tokens is None:
            return slice(None)
        return torch.as_tensor(list(tokens), device=home_of(self.model.reader.head_unembed))

    def _directions(self, row: int, model: HookedALM) -> Float[Tensor, "token d_model"]:
        assert not isinstance(self.metric, OnLogits)
        tokens = self.metric.tokens(row)
        return model.head_unembed.directions(None if tokens is None else list(tokens))

    def readouts(self, x: ALMInput, runs: Runs) -> list[Int[np.ndarray, " read"]]:
        """Rows of the records, one per prompt, whose logits predict the first answer token."""
        positions = _readout_positions(x)
        return [r.rows_of(np.array([at])) for r, at in zip(runs.records, positions, strict=True)]


def heard_as(
    model: HookedALM,
    x: ALMInput,
    rows: EncoderRows,
    row: int,
    streams: Float[Tensor, "cell row d_audio"],
) -> Float[Tensor, "cell pos d_model"]:
    """Streams that enter the first block if the encoder's last block had left some, in many cells.

    Where cross-attention reads the encoder, the memory instead: ``[cell, memory_pos, d_model]``.

    Args:
        model: with its path to a head.
        x: prompts, of which one is heard in every cell.
        rows: of these.
        row: index of the prompt.
        streams: streams of the rows that run.
    """
    assert model.audio is not None
    prompt, states = x[row], rows.states(row, streams)
    # The encoder is every thread's, and starts behind its blocks meanwhile.
    with model.turn.running():
        heard = model.audio.embed_states(prompt.clips, states, len(streams))
        return heard if model.cfg.cross_attention else model.embed_heard(prompt, heard)


@contextmanager
def in_precision(precision: Precision, *models: HookedALM) -> Iterator[None]:
    """Runs of some models in the precision that was asked for, within the context.

    Raises:
        InputError: no such precision, or one that a model's attention cannot run in.
    """
    if precision not in get_args(Precision):
        raise InputError(f"patching in precision {precision!r}: expected 'model' or 'float32'.")
    with ExitStack() as stack:
        if precision == "float32":
            is_low = any(m.part is not None and m.cfg.dtype != torch.float32 for m in models)
            if is_low:
                raise InputError(
                    "patching the encoder in precision='float32': it runs in the model's own. Load "
                    "the model with dtype='float32', or take precision='model'."
                )
            for model in models:
                stack.enter_context(in_float32(model))
        yield


def refuse_other_shape(model: HookedALM, other: HookedALM) -> None:
    """Refuse a donor's model whose activations are not of the shape of the base's.

    Raises:
        InputError: the two differ in a size, or in the head that is read.
    """
    sizes = ("n_layers", "d_model", "n_heads", "n_key_value_heads", "d_head", "d_mlp")
    pairs = {n: (getattr(model.path_cfg, n), getattr(other.path_cfg, n)) for n in sizes}
    pairs["d_vocab"] = model.cfg.d_vocab, other.cfg.d_vocab
    pairs["path"], pairs["head"] = (model.path, other.path), (model.head, other.head)
    if wrong := [f"{name} {b} for {a}" for name, (a, b) in pairs.items() if a != b]:
        raise InputError(
            f"patching {model.cfg.model_name!r} with runs of {other.cfg.model_name!r}: got "
            f"{', '.join(wrong)}. Give a donor_model of the same shape, such as another "
            "fine-tuning of the same base."
        )


def _checked_metric(model: HookedALM, metric: Metric | OnLogits, n_rows: int) -> Metric | OnLogits:
    """The metric, its words looked up; refused if it is none, or not one of these rows."""
    if isinstance(metric, OnLogits) and callable(metric.function):
        return metric
    if isinstance(metric, type | OnLogits) or not isinstance(metric, Metric):
        name = getattr(metric, "__name__", repr(metric))
        raise InputError(
            f"measuring with {name}: expected a metric, such as LogitDiff(answer, other), KL() or "
            "OnLogits(function) for a function of the logits [batch, pos, vocab]."
        )
    metric = with_ids(metric, model.to_single_token)
    per_row = [getattr(metric, name, None) for name in ("answer", "other", "target")]
    for given in per_row:
        if isinstance(given, Sequence) and not isinstance(given, str) and len(given) != n_rows:
            raise InputError(
                f"measuring {n_rows} rows: the metric has answers for {len(given)}. Give one for "
                "all, or one per row of the batch."
            )
    answers = [given for given in per_row if not isinstance(given, str) and given is not None]
    tokens = [t for given in answers for t in ([given] if isinstance(given, int) else given)]
    tokens += [token for row in range(n_rows) for token in metric.tokens(row) or ()]
    if wrong := sorted(
        {t for t in tokens if isinstance(t, int) and not 0 <= t < model.cfg.d_vocab}
    ):
        raise InputError(
            f"measuring with tokens {wrong}: the vocabulary has ids 0 to {model.cfg.d_vocab - 1}."
        )
    return metric


class _Unpatched(Reference):
    """The runs that a divergence compares with, computed when a metric asks."""

    def __init__(self, measurement: Measurement, row: int) -> None:
        self.measurement, self.row = measurement, row

    @property
    def base(self) -> Tensor:
        m = self.measurement
        return m.readout_logits(m.model, m.base, m.base_runs, self.row)

    @property
    def donor(self) -> Tensor:
        m = self.measurement
        if m.donor is None or m.donor_runs is None:
            raise InputError(
                "measuring a divergence from the donor: this donor is not a run. Compare with the "
                "base, or give prompts as donor."
            )
        return m.readout_logits(m.donor_model, m.donor, m.donor_runs, self.row)


def _logits(
    model: HookedALM,
    resid: Float[Tensor, "cell d_model"],
    directions: Float[Tensor, "token d_model"],
) -> Float[Tensor, "cell token"]:
    """Logits of some tokens in fp32, from the stream after the last block."""
    dtype = torch.promote_types(model.cfg.dtype, torch.float32)
    read = model.head_norm(resid.to(dtype)).to(directions.device)
    return F.linear(read, directions.to(dtype)).float()


def _readout_positions(x: ALMInput) -> list[int]:
    return [x.spans.positions("readout", row)[-1] for row in range(len(x))]
