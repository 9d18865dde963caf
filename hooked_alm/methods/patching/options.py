"""Options that sweeps take by keyword: each once, with its default and its meaning.

``takes`` puts the options of a function into its signature and its docstring, where ``help(patch)``
shows them as if they had been written there.
"""

import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, TypeVar, cast, get_type_hints

from ...model import HookedALM
from ...points import Site
from ..dictionary.splice import Splice
from .alignment import AlignPolicies, Place

Engine = Literal["fast", "hooks"]
PatchMode = Literal["replace", "interpolate", "add", "scale"]
PathMode = Literal["edge", "ioi"]
Precision = Literal["model", "float32"]
NormMode = Literal["exact", "frozen"]
Joint = int | Sequence[int]
"""Index to patch, or several that are patched at once."""
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


class Option(NamedTuple):
    """Default and meaning of an option."""

    default: Any
    meaning: str


class SharedOptions(TypedDict, total=False):
    """Options of every sweep and attribution."""

    policy: Annotated[
        AlignPolicies, Option("error", "for places of unequal length; see ``align``.")
    ]
    max_bytes: Annotated[
        int | None,
        Option(
            None,
            "memory budget of the fast engine; None takes a quarter of what is free, on a CPU at "
            "most 64 MiB.",
        ),
    ]


class HeadsOption(TypedDict, total=False):
    """Option of what tells kv heads from query heads."""

    kv: Annotated[
        Literal["group", "query"],
        Option("group", '"query" takes k and v once per query head instead of per kv head.'),
    ]


class ExactOptions(SharedOptions, total=False):
    """Options of every exact sweep."""

    engine: Annotated[Engine, Option("fast", '"fast", or "hooks" for the plain loop.')]
    precision: Annotated[
        Precision,
        Option(
            "model",
            '"float32" runs base, donor and cells in fp32 from the weights as they are; the '
            "audio encoder stays in the model's precision.",
        ),
    ]


class PlacesOption(TypedDict, total=False):
    """Option of sweeps over places."""

    places: Annotated[
        Sequence[Place],
        Option(
            ("readout",),
            'span names (``"readout"`` among them), ``Window`` of seconds, positions, ``"all"``, '
            "or tuples of these, patched at once.",
        ),
    ]


class PlaceOption(TypedDict, total=False):
    """Option of what is patched at one place."""

    place: Annotated[Place, Option("readout", "one of what ``path_patch`` takes as ``places``.")]


class NodeOptions(SharedOptions, HeadsOption, total=False):
    """Options of sweeps over nodes: which nodes, and what is written there."""

    places: Annotated[
        Sequence[Place] | Literal["each"],
        Option(
            ("audio",),
            "as in ``path_patch``: spans, windows, positions, or tuples patched at once; the "
            'string "each" is every position of the prompt, one by one.',
        ),
    ]

    site: Annotated[
        Site,
        Option(
            "resid_post",
            "resid_post of block b is depth b + 1, resid_pre depth b; z is before the output "
            "projection; q, k, v before rotation; pre, gate and post are the MLP's neurons. With "
            "pattern, places are query positions, and whole rows of the pattern are written. "
            "Blocks with cross-attention have cross_attn.q and so on, too; places of its k and v "
            "are rows of the encoder, as `model.encoder_rows` has them.",
        ),
    ]
    layers: Annotated[
        Sequence[Joint] | None,
        Option(None, "blocks; None is each. A tuple patches several at once."),
    ]
    heads: Annotated[
        Sequence[Joint] | Literal["each"] | None,
        Option(
            None, "with z, q and pattern, query heads; with k and v, kv heads. None is all at once."
        ),
    ]
    neurons: Annotated[
        Sequence[Joint] | Literal["each"] | None,
        Option(None, "with pre, gate and post. None is all at once."),
    ]
    mode: Annotated[
        PatchMode,
        Option(
            "replace",
            "``replace`` writes d; ``interpolate`` ``(1 - c) a + c d``; ``add`` ``a + c d``; "
            "``scale`` ``c a``.",
        ),
    ]
    coefficient: Annotated[float, Option(1.0, "c.")]


class PatchOptions(NodeOptions, ExactOptions, total=False):
    """Options of ``patch``."""

    coefficients: Annotated[
        Sequence[float] | None,
        Option(
            None,
            "several values of c in one sweep, along an axis ``coefficient``; None is "
            "``coefficient`` alone.",
        ),
    ]
    donor_site: Annotated[
        Site | None,
        Option(
            None,
            "where the donor's values are read, if not at ``site``; to reproduce work that took "
            "them elsewhere.",
        ),
    ]
    donor_model: Annotated[
        HookedALM | None,
        Option(None, "model of the same shape that runs the donor; None is ``model``."),
    ]
    splice: Annotated[
        Splice | None,
        Option(
            None,
            "rows that a dictionary's reconstructions, or other edits, stand in for in all runs: "
            "base, donor and cells. The fast engine takes resid_post of the blocks on the way, and "
            "below them all of the encoder's points.",
        ),
    ]


class PathOptions(ExactOptions, HeadsOption, PlacesOption, total=False):
    """Options of ``path_patch``."""

    mode: Annotated[PathMode, Option("edge", '"edge" or "ioi"; see the module.')]
    norm: Annotated[
        NormMode,
        Option(
            "exact",
            '"frozen" divides by the base run\'s norm instead of the new one: the linearisation '
            "that gradient methods make.",
        ),
    ]


class EdgeSetOptions(ExactOptions, HeadsOption, PlacesOption, total=False):
    """Options of ``patch_edges``."""


class ChainOptions(ExactOptions, PlaceOption, total=False):
    """Options of ``patch_chains``."""


class PruneOptions(ChainOptions, HeadsOption, total=False):
    """Options of ``prune_edges``."""

    candidates: Annotated[
        Sequence[tuple[str, str]] | None,
        Option(
            None,
            "edges that may go; None is each. Start from the best scores of ``attribute_edges`` "
            "where there are too many.",
        ),
    ]


def takes(options: type, **defaults: Any) -> Callable[[FunctionT], FunctionT]:
    """Give a function some options: its signature, its docstring and its defaults.

    The function's own ``**options`` then holds every one of them.

    Args:
        options: a ``TypedDict`` whose fields are annotated with an ``Option``.
        defaults: defaults in place of the options' own.
    """
    hints = get_type_hints(options, include_extras=True)
    known: dict[str, Option] = {name: hint.__metadata__[0] for name, hint in hints.items()}
    known |= {name: known[name]._replace(default=value) for name, value in defaults.items()}

    def decorate(function: FunctionT) -> FunctionT:
        own = inspect.signature(function)
        named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        added = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=option.default,
                annotation=hints[name].__origin__,
            )
            for name, option in known.items()
        ]
        signature = own.replace(parameters=[*named, *added])

        @wraps(function)
        def call(*args: Any, **given: Any) -> Any:
            try:
                bound = signature.bind(*args, **given)
            except TypeError as error:  # that says what is missing or not known, but not to whom
                raise TypeError(f"{function.__name__}() {error}") from None
            bound.apply_defaults()
            return function(*bound.args, **bound.kwargs)

        vars(call)["__signature__"] = signature
        call.__doc__ = _with_arguments(function.__doc__ or "", known)
        return cast(FunctionT, call)

    return decorate


def _with_arguments(docstring: str, options: Mapping[str, Option]) -> str:
    """The docstring, its section of arguments continued with the options."""
    before, title, after = docstring.partition("    Args:\n")
    arguments, gap, rest = after.partition("\n\n")
    more = [
        textwrap.fill(
            f"{name}: {option.meaning}", 100, initial_indent=" " * 8, subsequent_indent=" " * 12
        )
        for name, option in options.items()
    ]
    return before + title + "\n".join((arguments.rstrip(), *more)) + gap + rest
