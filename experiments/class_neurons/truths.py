"""What ``class_neurons`` must find in the bundled models, whose rule is known."""

from ..workbench.run_folder import RunFolder
from ..workbench.truths import Between, Estimate, Truth
from .claims import EVEN

TRUTH_SETTINGS = {"pool": "readout", "alphas": (-1, 0), "n_draws": 1}


def _drive(folder: RunFolder) -> Estimate:
    """The audio's share of what moves the neurons of a class."""
    means = folder.read_table("drive_means").set_index(["chosen_by", "measure"])
    return Estimate.of(means.loc[("mad", "share")].to_dict())


TRUTHS = (
    Truth(
        claim="the audio's share of what drives the neurons of an emotion",
        find=_drive,
        known={"follows_voice": Between(low=EVEN), "follows_text": Between(high=EVEN)},
    ),
)
