"""Settings: which source wins, and what is said when one is wrong."""

import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hooked_alm.errors import InputError
from hooked_alm.experiments.registry import EXPERIMENTS, load_experiment
from hooked_alm.experiments.workbench.provenance import command_line
from hooked_alm.experiments.workbench.settings import as_yaml, load_settings
from workbench_toy import ToyConfig


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_words_win_over_options_over_file_over_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "model: file\nseed: 1\nlens: {norm: file, depths: [5]}\n")
    settings = load_settings(
        ToyConfig,
        file=file,
        options={"model": "option", "audio": "clips"},
        words=["model=word", "lens.norm=word", "delay_s=1e-3"],
    )
    assert settings.model == "word"
    assert settings.audio == "clips"
    assert settings.seed == 1
    assert (settings.lens.norm, settings.lens.depths) == ("word", [5])
    assert settings.delay_s == 1e-3
    assert settings.dtype == "float32"


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_settings(ToyConfig, file=write(tmp_path, "# none\n")) == ToyConfig()


def test_the_command_gives_the_same_settings() -> None:
    settings = load_settings(
        ToyConfig, words=["model=Qwen/Qwen2-Audio-7B", "lens.depths=[1]", "audio='12'", "seed=3"]
    )
    command = shlex.split(command_line("toy", settings))
    assert command[:3] == ["hooked-alm", "run", "toy"]
    words = [word for word in command[3:] if word != "-s"]
    assert words == ["model=Qwen/Qwen2-Audio-7B", "seed=3", 'audio="12"', "lens.depths=[1]"]
    assert load_settings(ToyConfig, words=words) == settings


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("sede=1", r"sede: got an unknown key, expected one of model, .*Did you mean seed\?"),
        ("lens.deepths=[1]", r"lens\.deepths: got an unknown key.* Did you mean lens\.depths"),
        ("lens=3", r"lens: got 3, expected a valid dictionary"),
        ("seed=many", "seed: got 'many', expected a valid integer"),
        ("dtype=int8", "dtype: got 'int8', expected 'float32', 'bfloat16' or 'float16'"),
        ("n_threads=0", "n_threads: got 0, expected greater than or equal to 1"),
        ("seed", "'seed': got no '=', expected key=value"),
        ("seed=[1", r"the setting 'seed=\[1': got expected .* expected YAML"),
    ],
)
def test_a_wrong_word_is_explained(word: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_settings(ToyConfig, words=[word])


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(InputError, match=r"(?s)seed: got .*n_units: got .*colour: got an unknown"):
        load_settings(ToyConfig, words=["seed=a", "n_units=b", "colour=c"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: [1\nmodel: x", r"settings\.yaml: got expected .* in line \d"),
        ("- seed", "got a list, expected a mapping"),
        ("seed: \x01", "a character that YAML does not allow"),
    ],
)
def test_a_bad_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_settings(ToyConfig, file=write(tmp_path, text))


def test_a_missing_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: got No such file"):
        load_settings(ToyConfig, file=tmp_path / "none.yaml")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_setting_has_its_meaning(name: str) -> None:
    kind = load_experiment(name).Config
    assert [key for key, field in kind.model_fields.items() if not field.description] == []
    lines = as_yaml(kind()).splitlines()
    for key in kind.model_fields:
        (at,) = [n for n, line in enumerate(lines) if line.startswith(f"{key}:")]
        assert lines[at - 1].startswith("# ")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{own}: &{own} [{', '.join([f'*{other}'] * 10)}]\n"
    for other, own in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "got more than 10000 values, counting what aliases repeat"),
        ("components: &a [*a]", "got more than 10000 values, counting what aliases repeat"),
        ("seed: 1\nseed: 2", "got the key 'seed' twice in line 2, column 1"),
        ("components: {a: b, 'a': c}", "got the key 'a' twice in line 1"),
        ("seed: " + "[" * 5000, "got values within values, too many of them.* Write it flatter"),
        ("seed: 0x_", r"got a value that cannot be read \(invalid literal.*Quote values"),
        ("seed: 2001-13-45", r"got a value that cannot be read \(month must be in"),
        ("seed: !!timestamp x", "got a value that cannot be read"),
        ("seed: !!bool maybe", "got a value that cannot be read"),
        ("seed: !!int ''", "got a value that cannot be read"),
        ("seed: " + "9" * 5000, r"got a value that cannot be read \(Exceeds the limit"),
        ("seed: 0x" + "f" * 6000, "seed: got a int too long to write, expected less than"),
        ("seed: !!python/object/apply:os.getcwd []", "got could not determine a constructor"),
        ("1: 2", "got the key 1, expected names of settings"),
        ("[1]: 2", "got found unhashable key"),
        ('model: "\\ud800"', "got half a character in"),
        ("seed: 1\n---\nseed: 2", "got but found another document"),
        ("seed: 12:99", "seed: got '12:99', expected a valid integer"),
        ("delay_s: .nan", "delay_s: got nan, expected a finite number"),
    ],
)
def test_every_fault_of_yaml_is_one_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_settings(ToyConfig, file=write(tmp_path, text))
    assert len(str(caught.value)) < 600


def test_anchors_are_read(tmp_path: Path) -> None:
    text = "components: &one {a: b}\nlens: {depths: &d [1, 2]}\naudio: x\n"
    settings = load_settings(ToyConfig, file=write(tmp_path, text))
    assert (settings.components, settings.lens.depths) == ({"a": "b"}, [1, 2])


@pytest.mark.parametrize("word", ["seed=" + "9" * 5000, "x" * 5000, "seed=[" + "[" * 5000])
def test_a_long_word_is_not_repeated_whole(word: str) -> None:
    with pytest.raises(InputError) as caught:
        load_settings(ToyConfig, words=[word])
    assert len(str(caught.value)) < 400


def _numbers(schema: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every number that a JSON schema allows, and where."""
    if isinstance(schema, dict):
        if schema.get("type") in ("integer", "number"):
            yield place, schema
        for key, value in schema.items():
            yield from _numbers(value, f"{place}.{key}")
    elif isinstance(schema, list):
        for value in schema:
            yield from _numbers(value, place)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_number_has_its_range(name: str) -> None:
    """At both ends, in tuples and mappings too; and outside of it the setting is refused."""
    kind = load_experiment(name).Config
    found = {
        (field, place): schema
        for field, inner in kind.model_json_schema()["properties"].items()
        for place, schema in _numbers(inner, field)
        if "enum" not in schema and "const" not in schema
    }
    assert len(found) >= 3
    for (field, place), schema in found.items():
        assert schema.keys() & {"minimum", "exclusiveMinimum"}, place
        assert schema.keys() & {"maximum", "exclusiveMaximum"}, place
        wrapped = [[value] if "items" in place else value for value in (-(10**30), 10**30)]
        extremes = wrapped + ([] if "items" in place else [math.nan, math.inf])
        for value in extremes:
            with pytest.raises(InputError, match=f"{field}.*: got"):
                load_settings(kind, options={field: value})
