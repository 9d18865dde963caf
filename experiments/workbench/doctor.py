"""What is wrong with this environment, and the cure."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

GIB = 2**30
# Not needed here, and able to break transformers when they do not fit torch (issue text: "operator
# torchvision::nms does not exist"); they get in as dependencies of other packages.
INTRUDERS = ("torchaudio", "torchvision", "torchcodec")
SHOWN = ("torch", "transformers", "transformer-lens")


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report."""

    status: Literal["ok", "warn", "fail"]
    text: str
    cure: str = ""


def examine() -> Iterator[Check]:
    """All checks; each is made when its turn comes, so that slow ones show as they finish."""
    yield Check("ok", f"Python {platform.python_version()}")
    yield from _requirements()
    yield from _intruders()
    yield _audio()
    yield _memory()
    yield _disk()
    yield _writing()
    yield _hugging_face()
    yield from _compute()


def _requirements() -> Iterator[Check]:
    """Every declared dependency against its declared range: the package's metadata has both."""
    for line in metadata.requires("hooked_alm") or []:
        wanted = Requirement(line)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        name, versions = wanted.name, wanted.specifier
        cure = f'pip install "{name}{versions}"'
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Check("fail", f"{name} is missing (supported: {versions})", cure)
            continue
        if not versions.contains(found, prereleases=True):
            yield Check("fail", f"{name} {found} is not supported (supported: {versions})", cure)
        elif name in SHOWN:
            yield Check("ok", f"{name} {found} (supported: {versions})")


def _intruders() -> Iterator[Check]:
    for name in INTRUDERS:
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        # In a process of its own: a broken native library may take the process with it.
        done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True)
        if done.returncode:
            text = f"{name} {found} cannot be imported; transformers may fail because of it"
            yield Check("fail", text, f"pip uninstall {name}   (hooked_alm does not need it)")
        else:
            yield Check("ok", f"{name} {found} can be imported")


def _audio() -> Check:
    try:
        import soundfile
        import soxr
    except (ImportError, OSError) as error:
        cure = "pip install --force-reinstall soundfile soxr"
        return Check("fail", f"audio files cannot be read: {error}", cure)
    library = soundfile.__libsndfile_version__
    return Check("ok", f"audio: soundfile with libsndfile {library}, soxr {soxr.__version__}")


def _memory() -> Check:
    try:
        meminfo = Path("/proc/meminfo").read_text("utf-8")
    except OSError:
        return Check("ok", "free memory: not known on this system")
    free = int(re.findall(r"MemAvailable:\s+(\d+) kB", meminfo)[0]) * 1024 / GIB
    text = f"free memory: {free:.1f} GiB"
    if free < 2:
        return Check("warn", text, "close other programs; the bundled models need about 1 GiB")
    return Check("ok", f"{text} (a model needs 2 GiB per billion parameters in bfloat16)")


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free / GIB
    if free < 1:
        return Check("warn", f"free disk: {free:.1f} GiB here", "free some, or use --out elsewhere")
    return Check("ok", f"free disk: {free:.1f} GiB here")


def _writing() -> Check:
    try:
        with tempfile.TemporaryFile(dir=Path.cwd()):
            pass
    except OSError as error:
        cure = "change to a folder of your own, or use --out"
        return Check("fail", f"{Path.cwd()} cannot be written to: {error.strerror}", cure)
    return Check("ok", "the current folder can be written to")


def _hugging_face() -> Check:
    is_offline = any(
        os.environ.get(name, "").upper() in {"1", "TRUE", "ON", "YES"}
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )
    if is_offline:
        return Check("ok", "Hugging Face: offline; give models as folders, or unset HF_HUB_OFFLINE")
    return Check("ok", "Hugging Face: online; models given by id are downloaded")


def _compute() -> Iterator[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Check("fail", f"torch: {error}", "pip install torch")
        return
    yield Check("ok", f"threads: {torch.get_num_threads()} of {os.cpu_count()} processors")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield Check("ok", f"GPU: {', '.join(names)} (use -s device=cuda)")
    else:
        yield Check("ok", "GPU: none found; everything runs on the CPU")
