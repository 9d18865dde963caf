"""A ``tuned_lens`` run that another process can be given to do."""

from pathlib import Path
from typing import Any

import torch

from hooked_alm.experiments.tuned_lens.experiment import TuneLens
from hooked_alm.experiments.tuned_lens.settings import TunedLensConfig
from hooked_alm.experiments.workbench import figures, runner
from hooked_alm.experiments.workbench.run_folder import RunFolder


def run_tuned_lens(out: Path, **settings: Any) -> RunFolder:
    """Runs it with small figures, on one thread."""
    torch.set_num_threads(1)
    figures.DOTS_PER_INCH = 30
    return runner.run(TuneLens(TunedLensConfig(**settings)), out)
