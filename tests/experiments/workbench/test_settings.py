"""Settings: which source wins, and what is said when one is wrong."""

import shlex
from pathlib import Path

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
