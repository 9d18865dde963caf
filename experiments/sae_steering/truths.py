"""What ``sae_steering`` must find in a bundled Whisper that writes nothing of non-speech."""

from ..workbench.run_folder import RunFolder
from ..workbench.truths import Truth

NOTHING = "nothing to remove"


def share_removed(folder: RunFolder) -> float | str:
    """Share of the words out of nothing that go with the features of non-speech."""
    table = folder.read_table("steering").set_index("arm")
    was = float(table.fpr_mean["nothing"])
    mine = table.loc[["features"]]
    return float(mine.removed_mean[mine.alpha == 1].iloc[0]) / was if was else NOTHING


TRUTHS = (
    Truth(
        claim="share of the words out of nothing that the features of non-speech carry",
        find=share_removed,
        known={"tiny_whisper": NOTHING},
    ),
)
