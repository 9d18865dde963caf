"""Settings: those that every experiment has, and how they are read.

Defaults, then a YAML file, then ``key=value`` words; the last one wins.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hooked_alm.bundled import PREFIX
from hooked_alm.errors import InputError

M = TypeVar("M", bound=BaseModel)

Truncate = Annotated[bool, Field(description="cut over-long clips instead of refusing them")]
TunedLensFolder = Annotated[
    str | None,
    Field(description="folder of a trained lens, such as RUN/lens of tuned_lens; None is the "
          "logit lens"),
]  # fmt: skip
EngineBytes = Annotated[
    int,
    Field(ge=1, description="activations that the fast engine holds; fixed, so that results do "
          "not depend on what memory is free"),
]  # fmt: skip
"""Settings that several experiments have."""


class ExperimentConfig(BaseModel):
    """The settings that every experiment has; an experiment adds its own in a subclass."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    SEED_DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    """Defaults under ``variant: seed``; empty where no seed document has the experiment."""
    KNOWN_WITH: ClassVar[tuple[str, ...]] = ()
    """What is asked, where the package carries it: with these settings as they are by default, or
    naming what is bundled, a bundled model's answer is known."""

    model: str = Field(default=f"{PREFIX}follows_text", description="id, folder or bundled:NAME")
    revision: str | None = Field(default=None, description="branch, tag or commit of a model id")
    components: dict[str, str] = Field(
        default={}, description="parts whose weights are elsewhere: name to folder or id"
    )
    lora: str | None = Field(default=None, description="a PEFT adapter's folder or id, merged")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="of weights and activations"
    )
    device: str = Field(default="cpu", description="as torch names it: cpu, cuda, cuda:1, mps")
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        default="sdpa", description="attention kernel, as transformers names it"
    )
    seed: int = Field(default=0, description="of every draw: splits, random controls, intervals")
    variant: Literal["corrected", "seed"] = Field(
        default="corrected", description="seed makes the defaults what the seed document did"
    )
    n_threads: int | None = Field(default=None, ge=1, description="None leaves torch's own number")
    n_resamples: int = Field(default=2000, ge=1000, description="draws behind every interval")

    @property
    def is_calibration(self) -> bool:
        """Whether the answer is known beforehand: a bundled model, asked what it was made for."""
        fields = type(self).model_fields
        asked = [(name, getattr(self, name)) for name in self.KNOWN_WITH]
        return (
            self.model.startswith(PREFIX)
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
    def _defaults_of_variant_and_model(cls, values: dict[str, Any]) -> dict[str, Any]:
        defaults = dict(cls.SEED_DEFAULTS) if values.get("variant") == "seed" else {}
        if str(values.get("model", cls.model_fields["model"].default)).startswith(PREFIX):
            defaults["n_threads"] = 1  # matrices this small are slower on several threads
        return {**defaults, **values}

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
        _put(values, key, value)
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise InputError(
                f"reading the setting {word!r}: got no '=', expected key=value. "
                f"Write for example: -s seed=1"
            )
        _put(values, key.strip(), _parse(text, f"the setting {word!r}"))
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError(_explain(error, kind)) from None


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping."""
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
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
    return values


def as_yaml(settings: BaseModel) -> str:
    """All settings as a YAML file, each below a comment: what it means, and what it may be."""
    lines = []
    for key, value in settings.model_dump(mode="json").items():
        field = type(settings).model_fields[key]
        is_choice = get_origin(field.annotation) is Literal
        choices = f"one of {', '.join(map(str, get_args(field.annotation)))}" if is_choice else ""
        if comment := "; ".join(filter(None, [field.description, choices])):
            lines.append(f"# {comment}\n")
        lines.append(yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True))
    return "".join(lines)


def _parse(text: str, what: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "a character that YAML does not allow"
        raise InputError(
            f"reading {what}: got {problem}{where}, expected YAML. "
            f"Quote values that contain special characters."
        ) from None


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


def _explain(error: ValidationError, kind: type[BaseModel]) -> str:
    keys = list(dict.fromkeys(known_keys(kind)))
    problems = []
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, keys, n=3, cutoff=0.5)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            problems.append(f"{key}: got an unknown key, expected one of {', '.join(keys)}.{hint}")
        else:
            shown = "nothing" if item["type"] == "missing" else repr(item["input"])
            message = item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            problems.append(f"{key or 'all'}: got {shown}, expected {message}.")
    return "reading the settings: " + "\n  ".join(["", *problems] if problems[1:] else problems)
