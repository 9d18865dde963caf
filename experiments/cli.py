"""The command line. Nothing heavy is imported before a command needs it."""

import os
import re
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hooked_alm.errors import HookedALMError, InputError

from .registry import EXPERIMENTS, known_experiments, load_experiment, question_of

app = typer.Typer(
    help="Mechanistic interpretability for audio language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
MARKS = {"ok": ("ok  ", None), "warn": ("warn", "yellow"), "fail": ("FAIL", "red")}


def _paths(begun: str) -> list[str]:
    """What the path may become: a file, or a folder, which ends in a slash."""
    head = begun[: begun.rfind("/") + 1]
    paths = Path(head or ".").glob("*")
    names = [head + path.name + ("/" if path.is_dir() else "") for path in paths]
    return sorted(name for name in names if name.startswith(begun))


def _experiments(begun: str) -> list[str]:
    names = [name for name in sorted(known_experiments()) if name.startswith(begun)]
    return names + [path for path in _paths(begun) if path.endswith((".py", "/"))]


def _models(begun: str) -> list[str]:
    from hooked_alm.bundled import bundled_models

    names = [name for name in bundled_models() if name.startswith(begun)]
    return names + [path for path in _paths(begun) if path.endswith("/")]


Model = Annotated[
    str,
    typer.Argument(
        help="A folder, an id, or bundled:NAME.", metavar="MODEL", autocompletion=_models
    ),
]
Run = Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")]
ModelName = Annotated[
    str | None, typer.Option(help="Folder, id or bundled:NAME.", autocompletion=_models)
]
Out = Annotated[Path | None, typer.Option(help="Run folder; default runs/...")]
SettingsFile = Annotated[Path | None, typer.Option(help="Settings in a YAML file.")]
Setting = Annotated[
    list[str] | None,
    typer.Option(
        "-s",
        metavar="KEY=VALUE",
        help="One setting, such as dtype=bfloat16; wins over all others.",
    ),
]
ExecutorName = Annotated[
    Literal["serial", "process", "ray"],
    typer.Option("--executor", help="Where units are measured: here, in processes, or by Ray."),
]
WorkerCount = Annotated[
    int | None, typer.Option(help="How many processes or Ray actors; one per GPU.", min=1)
]
RayAddress = Annotated[
    str | None, typer.Option(help="A Ray cluster, such as auto; none is one of its own.")
]
ShardOf = Annotated[
    str | None,
    typer.Option(metavar="I/N", help="Measure part I of N alone; see hooked-alm merge."),
]
AutoBatch = Annotated[
    bool,
    typer.Option("--auto-batch", help="Measure the largest batches that fit, and use them."),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say what happens, unit by unit.")]
Open = Annotated[bool, typer.Option("--open", help="Show report.html in the browser.")]
Components = Annotated[
    list[str] | None,
    typer.Option("--component", metavar="NAME=PATH", help="A part whose weights are elsewhere."),
]


def say(*lines: object, colour: str | None = None, err: bool = False) -> None:
    """Prints lines, in which nothing that comes from data moves the cursor or ends the line."""
    from .workbench.inert import for_terminal

    for line in lines:
        typer.secho(for_terminal(str(line)), fg=colour, err=err)


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: Any = None
) -> str:
    from .workbench.inert import for_terminal

    return for_terminal(f"{category.__name__}: {message}") + "\n"


def main() -> None:
    """Runs the command line; an error of the user's is one message, not a traceback."""
    warnings.formatwarning = _warning
    try:
        app(prog_name="hooked-alm")
    except HookedALMError as error:
        if os.environ.get("HOOKED_ALM_DEBUG"):
            raise
        notes = getattr(error, "__notes__", [])
        say(f"Error: {error}", *notes, colour="red", err=True)
        sys.exit(2)


def _version(is_asked: bool | None) -> None:
    if is_asked:
        say(version("hooked_alm"))
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool | None,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = None,
) -> None: ...


@app.command()
def run(
    name: Annotated[
        str,
        typer.Argument(
            help=f"One of {', '.join(sorted(EXPERIMENTS))}; or a Python file with your own.",
            autocompletion=_experiments,
        ),
    ],
    model: ModelName = None,
    audio: Annotated[str | None, typer.Option(help="Your own recordings: a folder or CSV.")] = None,
    out: Out = None,
    config: SettingsFile = None,
    setting: Setting = None,
    executor: ExecutorName = "serial",
    workers: WorkerCount = None,
    ray_address: RayAddress = None,
    shard: ShardOf = None,
    auto_batch: AutoBatch = False,
    show_settings: Annotated[
        bool,
        typer.Option("--show-settings", help="Print all settings with their meaning and stop."),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what it would take, from its first units, and stop."),
    ] = False,
    verbose: Verbose = False,
    show: Open = False,
) -> None:
    """Run an experiment, or resume it: finished work is kept and found again."""
    from .workbench.settings import as_yaml, load_settings

    experiment = load_experiment(name)
    if audio is not None and "audio" not in experiment.Config.model_fields:
        raise InputError(
            f"running {name} with --audio: its items name their clips themselves. Give the file of "
            f"items; hooked-alm run {name} --show-settings says in which setting."
        )
    given = {"model": model, "audio": audio}
    options = {key: value for key, value in given.items() if value is not None}
    settings = load_settings(experiment.Config, file=config, options=options, words=setting or [])
    if show_settings:
        say(*as_yaml(settings).rstrip("\n").split("\n"))
        return
    from .workbench import runner
    from .workbench.dry_run import dry_run as lines_of_dry_run
    from .workbench.run_folder import RunFolder

    how = _how(executor, workers, ray_address, shard)
    try:
        if auto_batch:
            out = out or runner.default_out(experiment.name, settings)
            settings = _with_largest_batches(experiment(settings), out, how)
        if dry_run:
            where = RunFolder(out or runner.default_out(experiment.name, settings, how["shard"]))
            for line in lines_of_dry_run(experiment(settings), where, how["shard"]):
                say(line)
            return
        folder = runner.run(experiment(settings), out, is_verbose=verbose, **how)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    _conclude(folder, show)


def _with_largest_batches(experiment: Any, out: Path, how: dict[str, Any]) -> Any:
    """The settings with the batches that a run has begun with, or with the largest that fit."""
    from .workbench.auto_batch import auto_batched
    from .workbench.executors import Processes
    from .workbench.run_folder import RunFolder

    if how["shard"] is not None:
        raise InputError(
            "running with --auto-batch and --shard: every shard would measure batches of its own. "
            "Measure once, with --auto-batch --dry-run, and give each shard -s batch_size=..."
        )
    n_workers = getattr(how["executor"], "n_workers", 1)
    (first, *others) = Processes(n_workers).environments(experiment)
    return auto_batched(experiment, RunFolder(out), environment=first, n_workers=1 + len(others))


def _conclude(folder: Any, show: bool) -> None:
    """Says what a run found, or that units of other shards are left."""
    from .workbench.report import read_report, report_lines

    if not folder.has("report.json"):
        config, source = folder.path / "config.yaml", folder.provenance["source"]
        say(
            f"{len(folder.done())} units are done, others are left. To go on, either of",
            f"  hooked-alm merge {folder.path} ... --out FOLDER",
            f"  hooked-alm run {source} --config {config} --out {folder.path}",
        )
        return
    page = folder.path / "report.html"
    say(*report_lines(read_report(folder)), page)
    if show:
        _show(page)


def _how(
    executor: str, n_workers: int | None, ray_address: str | None, shard: str | None
) -> dict[str, Any]:
    """Where the units of a run are measured, and which."""
    return {
        "executor": _executor(executor, n_workers, ray_address),
        "shard": None if shard is None else _shard(shard),
    }


def _executor(name: str, n_workers: int | None, ray_address: str | None) -> Any:
    from .workbench.executors import InProcess, Processes

    given = {"--workers": n_workers, "--ray-address": ray_address}
    takes = {"serial": (), "process": ("--workers",), "ray": (*given,)}[name]
    if wrong := [key for key, value in given.items() if value is not None and key not in takes]:
        raise InputError(
            f"running with --executor {name}: got {' and '.join(wrong)}, which it does not take. "
            "Choose --executor process or ray, or leave it out."
        )
    if name == "process":
        return Processes(n_workers)
    if name == "ray":
        from .workbench.ray_executor import RayActors

        return RayActors(n_workers, ray_address)
    return InProcess()


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    number, n = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= n:
        raise InputError(
            f"reading --shard: got {text!r}, expected the part and the number of parts, such as "
            "1/3, 2/3 and 3/3."
        )
    return number, n


def _show(page: Path) -> None:
    import webbrowser

    if not webbrowser.open(page.resolve().as_uri()):
        say(f"No browser was found to show {page}.", err=True)


@app.command("list")
def list_experiments() -> None:
    """List the experiments, installed ones too, with the question of each."""
    known = known_experiments()
    width = max(map(len, known))
    for name, location in sorted(known.items()):
        say(f"{name:<{width}}  {question_of(location)}".rstrip())


@app.command()
def compare(left: Run, right: Run) -> None:
    """Compare two runs of one experiment: settings, claims with their intervals, controls."""
    from .workbench.compare import compare as lines_of
    from .workbench.run_folder import RunFolder

    for line in lines_of(RunFolder(left), RunFolder(right)):
        say(line)


@app.command()
def merge(
    runs: Annotated[list[Path], typer.Argument(help="Folders of all shards.", metavar="RUN...")],
    out: Annotated[Path, typer.Option(help="Folder for the merged run.")],
    experiment: Annotated[
        Path | None, typer.Option(help="The Python file of an experiment of your own.")
    ] = None,
    show: Open = False,
) -> None:
    """Bring the shards of a run together, and conclude where no unit is left to do."""
    from .workbench import runner
    from .workbench.merge import check_shards, merge
    from .workbench.run_folder import RunFolder
    from .workbench.settings import load_settings
    from .workbench.work import NO_PART

    shards = [RunFolder(one) for one in runs]
    about = check_shards(shards)
    source = str(about.get("source", about["experiment"]) if experiment is None else experiment)
    if source.endswith(".py") and experiment is None:
        # A folder may come from anybody; what is run is said by whoever runs it.
        raise InputError(
            f"merging {runs[0]}: got shards of the experiment in {source}, expected its file "
            f"on the command line. Add --experiment {source}, if you trust it."
        )
    kind = load_experiment(source)
    settings = load_settings(kind.Config, options=about["config"])
    merge(kind(settings), shards, RunFolder(out))
    _conclude(runner.run(kind(settings), out, shard=NO_PART), show)


@app.command()
def status(folder: Run) -> None:
    """Say how far a run is, also while it is at work elsewhere."""
    from .workbench.run_folder import RunFolder
    from .workbench.status import status_lines

    for line in status_lines(RunFolder(folder)):
        say(line)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("runs/demo"),
) -> None:
    """Run emotion_conflict on both bundled models and compare what it concludes."""
    from .emotion_conflict import demo as demonstration

    try:
        demonstration.main(out)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
def truths(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Experiments; all that have truths if none is given.", metavar="NAME"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("runs/truths"),
) -> None:
    """Run experiments on bundled models whose answer is known, and say what was found."""
    from .workbench.truth_runs import run_truths

    kinds = {name: load_experiment(name) for name in names or known_experiments()}
    if without := [name for name, kind in kinds.items() if names and not kind.truths]:
        raise InputError(
            f"running the truths of {', '.join(without)}: got an experiment without any, expected "
            "one that says what must be found in which bundled model. Leave it out."
        )
    hold = True
    try:
        for name, kind in kinds.items():
            if kind.truths:
                rows = run_truths(kind, out / name)
                say("", name, *(f"  {row.line()}" for row in rows))
                hold &= all(row.holds for row in rows)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if not hold:
        raise typer.Exit(1)


@app.command()
def report(folder: Run, show: Open = False) -> None:
    """Write report.html again from a finished run."""
    from .workbench.render import render
    from .workbench.run_folder import RunFolder

    page = render(RunFolder(folder))
    say(page)
    if show:
        _show(page)


@app.command()
def doctor() -> None:
    """Look for problems of the environment, and name their cures."""
    from .workbench.doctor import examine

    is_broken = False
    for check in examine():
        mark, colour = MARKS[check.status]
        say(f"{mark}  {check.text}", colour=colour)
        if check.cure:
            say(f"      cure: {check.cure}")
        is_broken |= check.status == "fail"
    if is_broken:
        raise typer.Exit(1)


@app.command()
def rename(
    folder: Annotated[Path, typer.Argument(help="Your recordings.")],
    mapping: Annotated[Path, typer.Argument(help="CSV: source, language, emotion, intensity.")],
    out: Annotated[Path, typer.Argument(help="Folder for the renamed copies.")],
) -> None:
    """Copy recordings to the names that emotion_conflict reads."""
    from .materials.recordings import rename_recordings

    for copy in rename_recordings(folder, mapping, out):
        say(copy)


@app.command()
def manifest(
    folder: Annotated[Path, typer.Argument(help="Your recordings, or a published corpus.")],
    corpus: Annotated[
        str | None,
        typer.Option(
            "--from", help="What their names follow: ravdess, crema-d, emodb, esd, iemocap."
        ),
    ] = None,
    n_clips: Annotated[int | None, typer.Option(help="How many there must be.")] = None,
) -> None:
    """Write manifest.csv: what is known of recordings, and their length, level and pitch."""
    from .materials.corpora import read_corpus
    from .materials.recordings import load_recordings, write_manifest

    found = read_corpus(folder, corpus) if corpus else load_recordings(folder, n_clips)
    say(write_manifest(folder, found))


@app.command()
def verify(
    model: Model,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of both models; the checkpoint's own if not given."),
    ] = None,
    attn: Annotated[Literal["sdpa", "eager"], typer.Option(help="Of both models.")] = "sdpa",
    device: Annotated[str, typer.Option(help="Of both models.")] = "cpu",
    tolerance: Annotated[float, typer.Option(help="Largest difference allowed.", min=0)] = 0.0,
    component: Components = None,
) -> None:
    """Compare a model with Hugging Face's own, depth by depth; any difference is an error.

    Where Hugging Face has no class for the model, its tensors and fields are accounted for.
    """
    from hooked_alm.converters import parity

    result = parity.verify(
        model,
        dtype=dtype,
        attn_implementation=attn,
        device=device,
        tolerance=tolerance,
        components=_named(component or []),
    )
    say(*result.table().split("\n"))
    if not result.passed:
        raise typer.Exit(1)


def _named(words: list[str]) -> dict[str, str]:
    """``NAME=PATH`` words as a mapping."""
    if wrong := [word for word in words if "=" not in word]:
        raise InputError(f"reading components: got {', '.join(wrong)}, expected NAME=PATH.")
    return dict(word.split("=", 1) for word in words)


@app.command()
def activations(
    points: Annotated[
        str,
        typer.Option(
            help="Hook points, with commas between: * is anything without a dot, {0,4} either, "
            "{0..4} the numbers from 0 to 4."
        ),
    ],
    spans: Annotated[
        str, typer.Option(help="Positions, with commas between: audio, text, readout, ... or all.")
    ] = "audio",
    manifest: Annotated[
        str | None, typer.Option(help="Your clips: a table with the column path, or a folder.")
    ] = None,
    model: ModelName = None,
    out: Out = None,
    config: SettingsFile = None,
    setting: Setting = None,
    executor: ExecutorName = "serial",
    workers: WorkerCount = None,
    ray_address: RayAddress = None,
    shard: ShardOf = None,
    auto_batch: AutoBatch = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say how many rows and bytes it would be, and stop.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Store activations of your clips, for probes and dictionaries; resumes what was begun.

    Their size is told before the model is loaded. ActivationReader reads RUN/activations/....
    """
    from hooked_alm.methods.activations.selection import split_patterns

    from .activations.experiment import StoreActivations
    from .workbench import runner
    from .workbench.settings import load_settings

    given = {
        "model": model, "audio": manifest, "points": split_patterns(points),
        "spans": split_patterns(spans),
    }  # fmt: skip
    options = {key: value for key, value in given.items() if value is not None}
    settings = load_settings(
        StoreActivations.Config, file=config, options=options, words=setting or []
    )
    how = _how(executor, workers, ray_address, shard)
    where = out or runner.default_out(StoreActivations.name, settings, how["shard"])
    if auto_batch:
        settings = _with_largest_batches(StoreActivations(settings), where, how)
    experiment = StoreActivations(settings)
    say(*experiment.planned().lines())
    experiment.check_room(where, how["shard"])
    if dry_run:
        return
    try:
        folder = runner.run(experiment, where, is_verbose=verbose, **how)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if folder.has("report.json"):
        say(*(folder.path / name for name in folder.read_table("stores")["folder"]))
    _conclude(folder, show=False)


@app.command()
def models(
    markdown: Annotated[bool, typer.Option(help="As the README has it.")] = False,
) -> None:
    """List the supported families, with the evidence for each."""
    from hooked_alm.converters import model_table

    say(*(model_table.as_markdown() if markdown else model_table.as_text()).split("\n"))


@app.command()
def hooks(model: Model, component: Components = None) -> None:
    """List every hook point of a model with its shape, and which cost nothing until hooked."""
    from hooked_alm.converters.loading import lay_out
    from hooked_alm.points import point_of

    layout = lay_out(model, components=_named(component or []))
    shapes = layout.model.hook_shapes()
    width = max(map(len, shapes))
    for name, shape in shapes.items():
        note = "  (on demand)" if point_of(name).on_demand else ""
        say(f"{name:<{width}}  {shape}{note}")
