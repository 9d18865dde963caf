"""Options stand once: every function that takes them shows them, with defaults and meaning."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypedDict, Unpack, get_type_hints

import pytest

from hooked_alm.methods.attribution.edges import attribute_edges
from hooked_alm.methods.attribution.nodes import attribute_nodes
from hooked_alm.methods.patching.options import Option, PatchOptions, takes
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.patching.paths import patch_chains, patch_edges, path_patch
from hooked_alm.methods.patching.pruning import prune_edges

BASE = {"model", "base", "donor", "metric"}
NODES = {"site", "layers", "heads", "neurons", "places", "mode", "coefficient", "policy", "kv"}
RUN = {"policy", "engine", "max_bytes", "precision"}
CHECK = {"check", "seed", "rows_at_once", "max_bytes"}
CALLS: dict[Callable[..., Any], set[str]] = {
    patch: BASE | NODES | RUN | {"donor_site", "donor_model", "coefficients", "splice", "runs"},
    attribute_nodes: BASE | NODES | CHECK | {"qk_fix"},
    path_patch: BASE | RUN | {"from_nodes", "to_nodes", "mode", "places", "kv", "norm"},
    patch_edges: BASE | RUN | {"edge_sets", "places", "kv"},
    patch_chains: BASE | RUN | {"chains", "place"},
    prune_edges: BASE | RUN | {"threshold", "candidates", "place", "kv"},
    attribute_edges: BASE | CHECK | {"from_nodes", "to_nodes", "method", "steps", "endpoint"}
    | {"places", "policy", "kv"},
}  # fmt: skip


@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_the_call_form(function: Callable[..., Any]) -> None:
    """Every parameter has its name, its default if it is an option, and its line of help."""
    parameters = inspect.signature(function).parameters
    assert {*parameters} == CALLS[function]
    documented = (function.__doc__ or "").split("Args:")[1].split("Returns:")[0].split("Raises:")[0]
    for name, parameter in parameters.items():
        assert f"\n        {name}: " in documented
        has_default = parameter.default is not parameter.empty
        assert has_default == (parameter.kind is parameter.KEYWORD_ONLY or (name == "metric"
                               and function is prune_edges))  # fmt: skip
    assert max(map(len, (function.__doc__ or "").splitlines())) <= 100


def test_defaults_are_a_functions_own_where_it_says_so() -> None:
    def default(function: Callable[..., Any], name: str) -> Any:
        return inspect.signature(function).parameters[name].default

    places = (default(f, "places") for f in (patch, path_patch, patch_edges, attribute_edges))
    assert [*places] == [("audio",), ("readout",), ("all",), ("all",)]
    assert (default(patch_chains, "place"), default(prune_edges, "place")) == ("readout", "all")
    assert (default(patch, "mode"), default(path_patch, "mode")) == ("replace", "edge")


def test_every_option_has_a_default_and_a_meaning() -> None:
    for hint in get_type_hints(PatchOptions, include_extras=True).values():
        (option,) = hint.__metadata__
        assert isinstance(option, Option)
        assert option.meaning.endswith(".")


class Two(TypedDict, total=False):
    first: Annotated[int, Option(1, "one.")]
    second: Annotated[str, Option("two", "the other, " + "which is long " * 9 + "indeed.")]


@takes(Two, second="second")
def both(a: int, **options: Unpack[Two]) -> tuple[int, Two]:
    """A function.

    Args:
        a: its own.

    Returns:
        All.
    """
    return a, options


def test_options_are_filled_in() -> None:
    assert both(3) == (3, {"first": 1, "second": "second"})
    assert both(a=3, first=5) == (3, {"first": 5, "second": "second"})
    assert both.__name__ == "both"
    lines = (both.__doc__ or "").splitlines()
    assert lines[3:5] == ["        a: its own.", "        first: one."]
    assert lines[5].startswith("        second: the other, which is long ")
    assert lines[6].startswith("            ")
    assert lines[6].endswith("long indeed.")
    assert [len(line) <= 100 for line in lines] == [True] * len(lines)
    assert lines[7:9] == ["", "    Returns:"]


@pytest.mark.parametrize(
    ("arguments", "options", "told"),
    [
        ((3,), {"third": 1}, r"both\(\) got an unexpected keyword argument 'third'"),
        ((), {}, "missing a required argument: 'a'"),
        ((3, 4), {}, "too many positional arguments"),
    ],
)
def test_what_is_not_taken_is_refused(arguments: Any, options: Any, told: str) -> None:
    with pytest.raises(TypeError, match=told):
        both(*arguments, **options)
