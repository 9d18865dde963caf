"""Table of all hook points.

A row says what a point shows, what of the residual stream it is made of and what it adds to it, how
far an edit there reaches within its block, and what it costs. Rows of a block are in the order in
which they fire. Every other list of points in the package is a view of this table, and full names
are built by ``hook_name``.
"""

import re
from functools import cache
from typing import Literal, NamedTuple, cast

from .config import StackConfig
from .errors import HookNameError

Site = Literal[
    "resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid",
    "cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.pattern", "cross_attn.z",
    "cross_attn_out", "resid_mid_cross",
    "pre", "gate", "post", "mlp_out", "resid_post",
]  # fmt: skip
"""Points that can be edited in a sweep, by their short names."""
UnitKind = Literal["head", "kv_head", "neuron"]
"""Kind of the part of a point that one index names."""
Reader = Literal[
    "q", "k", "v", "cross_q", "cross_k", "cross_v", "mlp",
    "resid_pre", "resid_mid", "resid_mid_cross", "resid_post",
]  # fmt: skip
"""Readers of the stream: through a norm and a projection, or the stream itself. ``cross_k`` and
``cross_v`` read a memory instead."""
Writer = Literal["embed", "attn", "cross_attn", "mlp"]
"""Writers to the stream."""
EditReach = Literal["own rows", "reading rows"]
"""Rows of its own block that an edit changes: those edited, or all that attend to them."""

RESID = "batch pos d_model"
ENCODER = "audio.encoder."
"""Beginning of the names of points in a hooked audio encoder."""
ENCODER_ALIASES = {
    f"{ENCODER}blocks.": "encoder_blocks.",
    f"{ENCODER}ln_final.": "encoder_ln_final.",
}
"""What TransformerLens calls the parts of an encoder."""
_ENCODER_AXES = {
    "batch": "window", "pos": "encoder_pos", "query_pos": "encoder_query_pos",
    "key_pos": "encoder_key_pos", "d_model": "d_audio",
}  # fmt: skip
_UNITS: dict[str, UnitKind] = {"head": "head", "kv_head": "kv_head", "d_mlp": "neuron"}


class Point(NamedTuple):
    """A row of the table: one hook point."""

    name: str
    """Name below its block; the last part of the name outside of blocks."""
    axes: str = RESID
    reads: Reader | None = None
    writes: Writer | None = None
    reach: EditReach | None = None
    """Rows that an edit changes; None where sweeps do not edit."""
    on_demand: bool = False
    """Whether the point is computed on the side, and only when something hooks it."""
    flag: str | None = None
    """Field of ``cfg`` that HookedTransformer hides the point behind; here it decides only whether
    a cache without names keeps it."""
    alias: str | None = None
    """TransformerLens' second name for the point."""

    @property
    def short(self) -> str:
        """Short name: ``z`` for ``attn.hook_z``, ``ln1.scale`` for ``ln1.hook_scale``."""
        return re.sub(r"^(attn|mlp)\.", "", self.name).replace("hook_", "")

    @property
    def unit(self) -> UnitKind | None:
        """Kind of the parts that the point is divided into, or None."""
        return next((_UNITS[axis] for axis in self.axes.split() if axis in _UNITS), None)

    @property
    def is_of_memory(self) -> bool:
        """Whether the point has rows of what cross-attention reads, not of the prompt."""
        return self.axes.split()[1:2] == ["memory_pos"]

    @property
    def position_axis(self) -> int | None:
        """Axis of the positions that run; None where it has none, as before the audio is merged."""
        axes = self.axes.split()
        return next((axes.index(axis) for axis in ("pos", "query_pos") if axis in axes), None)


def _norm(at: str, over: str = "batch pos", width: str = "d_model") -> tuple[Point, Point]:
    return (
        Point(f"{at}hook_scale", f"{over} 1", on_demand=True),
        Point(f"{at}hook_normalized", f"{over} {width}"),
    )


_SPLIT_INPUTS: tuple[tuple[Reader, str], ...] = (("q", "head"), ("k", "kv_head"), ("v", "kv_head"))
BLOCK = (
    Point("hook_resid_pre", reads="resid_pre", reach="reading rows"),
    Point("hook_attn_in", "batch pos head d_model", on_demand=True, flag="use_attn_in"),
    *(
        Point(f"hook_{part}_input", f"batch pos {heads} d_model", part, on_demand=True,
              flag="use_split_qkv_input", alias=f"attn.hook_{part}_input")
        for part, heads in _SPLIT_INPUTS
    ),
    *_norm("ln1."),
    Point("attn.hook_q", "batch pos head d_head", "q", reach="own rows"),
    Point("attn.hook_k", "batch pos kv_head d_head", "k", reach="reading rows"),
    Point("attn.hook_v", "batch pos kv_head d_head", "v", reach="reading rows"),
    *_norm("attn.q_norm.", "batch pos head", "d_head"),
    *_norm("attn.k_norm.", "batch pos kv_head", "d_head"),
    Point("attn.hook_rot_q", "batch pos head d_head"),
    Point("attn.hook_rot_k", "batch pos kv_head d_head"),
    Point("attn.hook_attn_scores", "batch head query_pos key_pos", on_demand=True),
    Point("attn.hook_pattern", "batch head query_pos key_pos", reach="own rows", on_demand=True),
    Point("attn.hook_z", "batch pos head d_head", writes="attn", reach="own rows"),
    Point("attn.hook_result", "batch pos head d_model", writes="attn", on_demand=True,
          flag="use_attn_result"),
    Point("hook_attn_out", writes="attn", reach="own rows"),
    Point("hook_resid_mid", reads="resid_mid", reach="own rows"),
    Point("hook_cross_attn_in", on_demand=True),
    Point("cross_attn.hook_q", "batch pos head d_head", "cross_q", reach="own rows"),
    Point("cross_attn.hook_k", "batch memory_pos kv_head d_head", "cross_k", reach="reading rows"),
    Point("cross_attn.hook_v", "batch memory_pos kv_head d_head", "cross_v", reach="reading rows"),
    Point("cross_attn.hook_attn_scores", "batch head query_pos memory_pos", on_demand=True),
    Point("cross_attn.hook_pattern", "batch head query_pos memory_pos", reach="own rows",
          on_demand=True),
    Point("cross_attn.hook_z", "batch pos head d_head", writes="cross_attn", reach="own rows"),
    Point("cross_attn.hook_result", "batch pos head d_model", writes="cross_attn", on_demand=True,
          flag="use_attn_result"),
    Point("hook_cross_attn_out", writes="cross_attn", reach="own rows"),
    Point("hook_resid_mid_cross", reads="resid_mid_cross", reach="own rows"),
    Point("hook_mlp_in", reads="mlp", on_demand=True, flag="use_hook_mlp_in"),
    *_norm("ln2."),  # before the cross-attention, where there is one
    *_norm("ln3."),
    Point("mlp.hook_pre", "batch pos d_mlp", reach="own rows"),
    Point("mlp.hook_gate", "batch pos d_mlp", reach="own rows"),
    Point("mlp.hook_pre_linear", "batch pos d_mlp"),
    Point("mlp.hook_post", "batch pos d_mlp", writes="mlp", reach="own rows"),
    Point("hook_mlp_out", writes="mlp", reach="own rows"),
    Point("hook_resid_post", reads="resid_post", reach="own rows"),
)  # fmt: skip
"""Points of every block, in the order in which they fire."""
OUTSIDE = (
    Point("hook_encoder_in", "window mel frame"),
    Point("hook_encoder_out", "window audio_pos d_audio"),
    Point("hook_projector_in", "window audio_pos d_audio"),
    Point("hook_projector_out", "window audio_pos d_model"),
    Point("hook_tokens", "batch pos", on_demand=True, flag="use_hook_tokens"),
    Point("hook_code_embed"),
    Point("hook_text_embed"),
    Point("hook_audio_embed", "clip audio_pos d_model"),
    Point("hook_embed", writes="embed"),
    Point("hook_pos_embed"),
    *_norm(""),
    Point("hook_in"),
    Point("hook_out", "batch pos vocab"),
)
"""Points of the model, its front-end, and the final norms and unembeddings behind stacks."""

SITES = {cast(Site, point.short): point for point in BLOCK if point.reach}
"""Points that sweeps edit, by short name, in the order in which they fire. A block has those of
``sites_of`` its config."""
SENDERS = {point.name: point for point in (*OUTSIDE, *BLOCK) if point.writes}
RECEIVERS = {
    name: point for point in BLOCK if point.reads for name in (point.name, point.alias) if name
}


def sites_of(cfg: StackConfig) -> list[Site]:
    """Points that sweeps edit in the blocks of a stack, in the order in which they fire."""
    return [
        site
        for site in SITES
        if ("cross" not in site or cfg.cross_attention) and (site != "gate" or cfg.gated_mlp)
    ]


_IN_BLOCK = re.compile(r"(?P<block>(?:.+\.)?\w*blocks\.\d+)\.(?P<point>.+)")
_BY_NAME = {name: point for point in BLOCK for name in (point.name, point.alias) if name}
_BY_SHORT = {point.short: point.name for point in BLOCK}
_BY_SHORT |= {p.alias.replace("hook_", ""): p.alias for p in BLOCK if p.alias}
_OUTSIDE = {point.name: point for point in OUTSIDE}


@cache
def point_of(name: str) -> Point:
    """The row of a hook point, by its full name.

    Raises:
        HookNameError: no row is about such a point.
    """
    match = _IN_BLOCK.fullmatch(name)
    found = _BY_NAME.get(match["point"]) if match else _OUTSIDE.get(name.rpartition(".")[2])
    if found is not None and name.startswith((ENCODER, *ENCODER_ALIASES.values())):
        return _in_encoder(found)
    if found is None:
        raise HookNameError(
            f"describing hook point {name!r}: the table of points has none such. Use a name of "
            "`model.hook_dict`; a new point needs a row in the table first."
        )
    return found


def _in_encoder(point: Point) -> Point:
    """The row of a point in an audio encoder, whose positions are none of the prompt's."""
    axes = " ".join(_ENCODER_AXES.get(axis, axis) for axis in point.axes.split())
    # A LayerNorm's kernel fuses what is before its point and behind it.
    is_fused = point.short.endswith("normalized")
    return point._replace(axes=axes, on_demand=point.on_demand or is_fused)


def hook_name(point: str, block: str = "") -> str:
    """Full name of a point: ``hook_name("z", "blocks.3")`` is ``blocks.3.attn.hook_z``.

    Args:
        point: short name in a block (``resid_pre``, ``z``, ``ln2.normalized``; ``attn.q_input`` for
            TransformerLens' second name), or the name of a point outside of blocks.
        block: name of the block, as ``model.path`` has it; "" outside of blocks.

    Raises:
        HookNameError: no such point.
    """
    if block and point in _BY_SHORT:
        return f"{block}.{_BY_SHORT[point]}"
    if not block and point in _OUTSIDE:
        return point
    known = ", ".join(_BY_SHORT if block else _OUTSIDE)
    raise HookNameError(
        f"naming point {point!r} of {block or 'the model'}: expected one of {known}."
    )
