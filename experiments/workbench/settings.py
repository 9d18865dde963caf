"""Settings: those that every experiment has, and how they are read.

Defaults, then a YAML file, then ``key=value`` words; the last one wins.
"""

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    model_validator,
)

from hooked_alm.bundled import PREFIX, bundled_models
from hooked_alm.errors import InputError

M = TypeVar("M", bound=BaseModel)

HALF = re.compile("[\ud800-\udfff]")
MOST_NODES = 10_000
"""Values in a file of settings."""


def _each_once(given: tuple[Any, ...]) -> tuple[Any, ...]:
    if len({*given}) < len(given):
        raise ValueError("each only once")
    return given


EachOnce = AfterValidator(_each_once)
"""Refuses settings that name something twice."""
ModelId = Annotated[
    str, Field(description="id, folder, bundled:NAME, or BASE+DELTA: a localised twin")
]
Truncate = Annotated[bool, Field(description="cut over-long clips instead of refusing them")]
TunedLensFolder = Annotated[
    str | None,
    Field(description="folder of a trained lens, such as RUN/lens of tuned_lens; None is the "
          "logit lens"),
]  # fmt: skip
DeviceNumber = Annotated[StrictInt, Field(ge=0, lt=1024)]
MOST_BYTES = 2**44
EngineBytes = Annotated[
    int,
    Field(ge=1, le=MOST_BYTES, description="activations that the fast engine holds; fixed, so that "
          "results do not depend on what memory is free"),
]  # fmt: skip
"""Settings that several experiments have."""


class ExperimentConfig(BaseModel):
    """The settings that every experiment has; an experiment adds its own in a subclass."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    SEED_DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    """Defaults under ``variant: seed``; empty where no seed document has the experiment."""
    KNOWN_WITH: ClassVar[tuple[str, ...]] = ()
    """What is asked, where the package carries it: with these settings as they are by default, or
    naming what is bundled, a bundled model's answer is known."""

    model: ModelId = f"{PREFIX}follows_text"
    revision: str | None = Field(default=None, description="branch, tag or commit of a model id")
    components: dict[str, str] = Field(
        default={}, description="parts whose weights are elsewhere: name to folder or id"
    )
    lora: str | None = Field(default=None, description="a PEFT adapter's folder or id, merged")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="of weights and activations"
    )
    device: str = Field(default="cpu", description="as torch names it: cpu, cuda, cuda:1, mps")
    device_map: str | DeviceNumber | dict[str, str | DeviceNumber] | None = Field(
        default=None,
        description="instead of device, as transformers takes it: auto, or module to device; disk "
        "leaves weights in files",
    )
    offload_folder: str | None = Field(
        default=None,
        exclude=True,  # of a run's identity: where copies lie decides no number
        description="for copies of weights that device_map leaves on the disk; None is temporary",
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        default="sdpa", description="attention kernel, as transformers names it"
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="of every draw: splits, random controls, intervals"
    )
    variant: Literal["corrected", "seed"] = Field(
        default="corrected", description="seed makes the defaults what the seed document did"
    )
    n_threads: int = Field(
        default=1, ge=1, le=1024, description="threads of every worker; sums depend on them"
    )
    n_resamples: int = Field(
        default=2000, ge=1000, le=100_000, description="draws behind every interval"
    )

    @property
    def subject(self) -> str:
        """What the run is about, as pages and folders name it."""
        return self.model

    @property
    def is_calibration(self) -> bool:
        """Whether the answer is known beforehand: a bundled model, asked what it was made for."""
        fields = type(self).model_fields
        asked = [(name, getattr(self, name)) for name in self.KNOWN_WITH]
        return (
            self.model in bundled_models()
            and self.lora is None
            and bool(asked)
            and all(
                f"{value}:".startswith(PREFIX)
                or value == fields[name].get_default(call_default_factory=True)
                for name, value in asked
            )
        )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_variant(cls, values: dict[str, Any]) -> dict[str, Any]:
        defaults = dict(cls.SEED_DEFAULTS) if values.get("variant") == "seed" else {}
        return {**defaults, **values}

    @model_validator(mode="after")
    def _is_placed_once(self) -> "ExperimentConfig":
        if self.device_map is not None and self.device != "cpu":
            raise ValueError("give device or device_map, not both")
        if self.offload_folder is not None and self.device_map is None:
            raise ValueError("offload_folder needs a device_map that leaves weights on the disk")
        return self

    @model_validator(mode="after")
    def _has_the_variant(self) -> "ExperimentConfig":
        if self.variant == "seed" and not self.SEED_DEFAULTS:
            raise ValueError("no seed document has this experiment: variant must be corrected")
        return self


def load_settings(
    kind: type[M],
    *,
    file: Path | None = None,
    options: Mapping[str, Any] | None = None,
    words: Sequence[str] = (),
) -> M:
    """The settings of an experiment, checked.

    Args:
        kind: the pydantic model that knows the keys, their types and their defaults.
        file: a YAML mapping.
        options: dotted key -> value, as command-line options of their own give them.
        words: ``key=value`` with dotted keys and YAML values, such as ``lens.depths=[0,4]``.

    Raises:
        InputError: everything that is wrong, in one message.
    """
    values = read_yaml(file) if file else {}
    for key, value in (options or {}).items():
        if isinstance(value, str) and HALF.search(value):
            raise InputError(f"reading {key}: got {_shown(value)}, expected text in UTF-8.")
        _put(values, key, value)
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise InputError(
                f"reading the setting {_shown(word)}: got no '=', expected key=value. "
                f"Write for example: -s seed=1"
            )
        _put(values, key.strip(), _parse(text, f"the setting {_shown(word)}"))
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError(_explain(error, kind)) from None


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping."""
    try:
        text = file.read_text("utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(
            f"reading settings from {file}: got {reason}, expected a YAML file. Check the path."
        ) from None
    values = _parse(text, f"settings from {file}")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(
            f"reading settings from {file}: got a {type(values).__name__}, expected a mapping. "
            f"Write one 'key: value' per line."
        )
    if wrong := [key for key in values if not isinstance(key, str)]:
        raise InputError(
            f"reading settings from {file}: got the key {_shown(wrong[0])}, expected names of "
            "settings. Quote a name that looks like a number or a word of YAML."
        )
    return values


def as_yaml(settings: BaseModel) -> str:
    """All settings as a YAML file, each below a comment: what it means, and what it may be."""
    lines = []
    values = settings.model_dump(mode="json")
    for key, field in type(settings).model_fields.items():
        value = values.get(key, getattr(settings, key))
        is_choice = get_origin(field.annotation) is Literal
        choices = f"one of {', '.join(map(str, get_args(field.annotation)))}" if is_choice else ""
        if comment := "; ".join(filter(None, [field.description, choices])):
            lines.append(f"# {comment}\n")
        lines.append(yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True))
    return "".join(lines)


class _Loader(yaml.SafeLoader):
    """YAML's plain values, without what no file of settings needs and what can do harm."""

    def compose_document(self) -> yaml.Node | None:
        """The document's nodes, of which an alias must not make too many."""
        found = super().compose_document()
        if found is not None and _n_nodes(found, {}) > MOST_NODES:
            raise yaml.MarkedYAMLError(
                problem=f"more than {MOST_NODES} values, counting what aliases repeat"
            )
        return found

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        """A value; half a character, which can be written as an escape, is no text."""
        if HALF.search(node.value):
            problem = f"half a character in {_shown(node.value)}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, in which every key may be once."""
        seen = set()
        for key, _ in node.value:
            if (name := (key.tag, repr(key.value))) in seen:
                problem = f"the key {_shown(key.value)} twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep=deep)


def _n_nodes(node: yaml.Node, known: dict[int, float]) -> float:
    """Values below a node; infinite if one is part of itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            parts = [one for pair in parts for one in pair]
        known[id(node)] = 1.0 + sum(_n_nodes(one, known) for one in parts)
    return known[id(node)]


def _parse(text: str, what: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "a character that YAML does not allow"
        cure = "Quote values that contain special characters"
    except RecursionError:
        problem, where, cure = "values within values, too many of them", "", "Write it flatter"
    # A date, number or tag that looks like one, and is none, fails somewhere in its reader.
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        problem, where = f"a value that cannot be read ({str(error).splitlines()[0][:80]})", ""
        cure = "Quote values that are text"
    raise InputError(f"reading {what}: got {problem}{where}, expected YAML. {cure}.")


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        below = values.get(parent)
        # What is no mapping gives way to one; the model then says if that was wrong.
        values[parent] = dict(below) if isinstance(below, dict) else {}
        values = values[parent]
    values[last] = value


def known_keys(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a settings model, nested models included."""
    for name, field in kind.model_fields.items():
        key = f"{prefix}{name}"
        yield key
        for nested in (field.annotation, *get_args(field.annotation)):
            if isinstance(nested, type) and issubclass(nested, BaseModel):
                yield from known_keys(nested, f"{key}.")


def _shown(value: Any) -> str:
    """A value in a message; of a long one, how it begins."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no integer of more than 4300 digits
        text = f"a {type(value).__name__} too long to write"
    return text if len(text) <= 80 else text[:77] + "..."


def _explain(error: ValidationError, kind: type[BaseModel]) -> str:
    keys = list(dict.fromkeys(known_keys(kind)))
    problems = []
    for item in error.errors(include_url=False):
        key = ".".join(_shown(part).strip("'") for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, keys, n=3, cutoff=0.5)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            problems.append(f"{key}: got an unknown key, expected one of {', '.join(keys)}.{hint}")
        else:
            shown = "nothing" if item["type"] == "missing" else _shown(item["input"])
            message = item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            problems.append(f"{key or 'all'}: got {shown}, expected {message}.")
    return "reading the settings: " + "\n  ".join(["", *problems] if problems[1:] else problems)
