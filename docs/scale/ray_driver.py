"""A run on a Ray cluster, from a program: `python ray_driver.py FOLDER [--address auto]`."""

import argparse

from hooked_alm.experiments.emotion_conflict.experiment import EmotionConflict
from hooked_alm.experiments.emotion_conflict.settings import EmotionConflictConfig
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.ray_executor import RayActors


def main() -> None:
    """Runs `emotion_conflict` on two workers; run again, it goes on where it stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--model", default="bundled:follows_text")
    parser.add_argument("--address", help="of a cluster; none is a session on this machine")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    settings = EmotionConflictConfig(model=options.model, donors=("self", "text_swap"))
    executor = RayActors(options.workers, options.address)
    folder = runner.run(EmotionConflict(settings), options.out, executor=executor)
    print(folder.path / "report.html")


if __name__ == "__main__":
    main()
