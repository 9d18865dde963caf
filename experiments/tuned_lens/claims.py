"""What a ``tuned_lens`` run controls and claims."""

from functools import partial

import numpy as np

from ..workbench.claims import Claim, Finding, judged, shown
from ..workbench.controls import Control, Outcome, at_most
from .tables import LensResults

MIN_GROUPS = 6
"""With fewer, not even a sign test in which all groups agree gives p < 0.05."""


def _output_is_read(run: LensResults) -> Outcome:
    held_out = run["held_out"]
    output = held_out[held_out.depth == held_out.depth.max()]
    return at_most(output[["kl_logit", "kl_tuned"]], 0.0, "nats")


CONTROLS = (
    Control(name="an untrained tuned lens is the logit lens", of=("held_out", "training"),
            check=lambda run: at_most(run["untrained"].difference, 0.0, "logits"),
            guards_against="translators that act before they have learnt anything"),
    Control(name="either lens reads the output at the last depth", of=("held_out",),
            check=_output_is_read,
            guards_against="a final norm that is left out or applied twice (I2)"),
)  # fmt: skip


def _closer(run: LensResults, place: str, where: str) -> Finding:
    """The claim that KL(tuned) < KL(logit) at every depth below the output."""
    scored = run["depths"][run["depths"].place == place]
    scored = scored[scored.depth < scored.depth.max()].reset_index(drop=True)
    worst = scored.loc[scored.gain_low.fillna(-np.inf).idxmin()]
    n, at = int(worst.n_groups), int(worst.depth)
    sizes = scored.gain / scored.kl_logit
    gain = {"mean": worst.gain, "low": worst.gain_low, "high": worst.gain_high, "n": n}
    return judged(
        f"{where} the tuned lens is closer to the output at every depth",
        f"Least sure at depth {at}: KL(logit) − KL(tuned) = {shown(gain, 3)} nats (band "
        f"over all depths). By depth it takes {sizes.min():.0%} to {sizes.max():.0%} "
        f"of the logit lens' distance away, {n} held-out groups",
        {
            f"only {n} held-out groups": n < MIN_GROUPS,
            f"not surely at depth {at}": not worst.gain_low > 0,
        },
        numbers=gain,
        unit="nats",
    )


def _earlier(run: LensResults) -> Finding:
    """The claim that its top token at the readout settles at an earlier depth."""
    rows = run["settling"].set_index("lens")
    means, gap = rows["mean"], rows.loc["earlier"].to_dict()
    n = int(gap["n_groups"])
    return judged(
        "The tuned lens reads the answer at an earlier depth",
        f"Its top token at the readout is the output's for good from depth "
        f"{means['tuned']:.2f} on, the logit lens' from {means['logit']:.2f}; "
        f"{shown(gap)} blocks earlier, {n} held-out groups",
        {
            f"only {n} held-out groups": n < MIN_GROUPS,
            "the difference is not surely above 0": not gap["low"] > 0,
        },
        numbers=gap,
        unit="blocks",
        count="n_groups",
    )


CLAIMS = (
    Claim(
        name="closer",
        rests_on=("held_out",),
        judge=partial(_closer, place="scored", where="On held-out prompts"),
    ),
    Claim(
        name="closer_at_readout",
        rests_on=("held_out",),
        judge=partial(_closer, place="readout", where="At the readout of held-out prompts"),
    ),
    Claim(name="earlier", rests_on=("held_out",), judge=_earlier),
)
