"""What ``class_neurons`` must find in the bundled models, whose rule is known."""

from ..workbench.run_folder import RunFolder
from ..workbench.truths import Between, Estimate, Truth, rows_of
from .claims import EVEN

TRUTH_SETTINGS = {"pool": "readout", "alphas": (-1, 0), "n_draws": 1}


def _drive(folder: RunFolder) -> Estimate:
    """The audio's share of what moves the neurons of a class."""
    share = rows_of(folder, "drive_means", chosen_by="mad", measure="share")
    return Estimate.of(share.iloc[0].to_dict())


TRUTHS = (
    Truth(
        claim="the audio's share of what drives the neurons of an emotion",
        find=_drive,
        known={"follows_voice": Between(low=EVEN), "follows_text": Between(high=EVEN)},
    ),
)
