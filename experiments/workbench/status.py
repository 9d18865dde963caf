"""How far a run is, told from its folder; the run may be at work on another machine."""

import json
from collections.abc import Iterator
from typing import Any

from .progress import progress_line
from .run_folder import RunFolder

FIELDS = {
    "progress": ("done", "units", "units_per_second", "seconds_left", "memory_mib"),
    "failed": ("unit", "error"),
}
"""Event -> what is told of it."""


def status_lines(folder: RunFolder) -> Iterator[str]:
    """Lines that say what a run is, whether it is at work, and how far it has come.

    Raises:
        InputError: the folder holds no run.
    """
    about, events = folder.provenance, _events(folder)
    is_at_work = folder.is_locked()
    last = events[-1] if events else {"event": "nothing", "time": about.get("created")}
    state = "at work" if is_at_work else "finished" if last["event"] == "done" else "not at work"
    yield f"{about['experiment']} of {about['config'].get('model')}: {state}"
    yield f"begun {about.get('created')}; the last event, {last['event']}, {last['time']}"
    done = len(folder.done())
    if told := next((one for one in reversed(events) if one["event"] == "progress"), None):
        line = progress_line(
            told["done"], told["units"], told["units_per_second"], told["seconds_left"],
            told["memory_mib"],
        )  # fmt: skip
        yield f"{told['time']}: {line}"
    yield f"{done} units are done"
    if begun := folder.claimed():
        what = "in work" if is_at_work else "begun and not ended"
        yield f"{what}: {', '.join(begun[:8])}{', ...' if len(begun) > 8 else ''}"
    for one in [one for one in events if one["event"] == "failed"][-3:]:
        yield f"failed {one['time']}: {one['unit']}: {one['error']}"


def _events(folder: RunFolder) -> list[dict[str, Any]]:
    """The run's events; a line that was cut by a kill is left out."""
    found = []
    if folder.has("events.jsonl"):
        for line in folder.read("events.jsonl").decode(errors="replace").splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if not isinstance(event, dict):
                continue
            told = FIELDS.get(str(event.get("event")), ())
            if {"event", "time", *told} <= event.keys():
                found.append(event)
    return found
