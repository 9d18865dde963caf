"""What a ``sae_features`` run controls and claims."""

from collections.abc import Sequence

from ..workbench.claims import Claim, Finding, judged
from ..workbench.controls import ROUNDING, Control, Outcome, at_most
from .tables import FeatureResults

SURE = 0.05


def _same_again(run: FeatureResults) -> Outcome:
    """What is shown of a clip reaches as high as when all clips were read."""
    again = run["frames"].groupby(["feature", "clip"])["activation"].max()
    first = run["activity"].set_index(["feature", "clip"])["highest"].reindex(again.index)
    allowed = ROUNDING["relative"][run.config.dtype]
    return at_most((again - first) / first, allowed, "of the highest")


def _all_rows(run: FeatureResults) -> Outcome:
    off = int(run["clips"]["rows"].sum()) - int(run.inputs["rows"])
    return at_most([off], 0.0, "rows")


CONTROLS = (
    Control(name="a feature is the same when its clip is read again", of=("frames", "activity"),
            check=_same_again,
            guards_against="features that are shown beside the wrong clip or time"),
    Control(name="every row of every clip is read", of=("clips", "activity"), check=_all_rows,
            guards_against="padding that counts as sound, and clips that are cut"),
)  # fmt: skip


def _domains(run: FeatureResults) -> Sequence[str]:
    return [*run.inputs["domains"]]


def _specialised(run: FeatureResults, domain: str) -> Finding:
    """The claim that more features are of a domain than if domains were dealt out."""
    row = run["domains"].set_index("domain").loc[domain]
    n, config = int(row["features"]), run.config
    return judged(
        f"More features fire in clips of {domain} than chance gives",
        f"{n} of {int(row['n_features'])} features are active in {config.domain_clips} clips or "
        f"more, of which {config.domain_share:.0%} or more are {domain}; by chance "
        f"{row['by_chance']:.1f} (95 % of the draws: {row['by_chance_high']:.0f} or fewer), "
        f"p = {row['p']:.3f}",
        {
            "no feature is": n == 0,
            f"as many by chance, p = {row['p']:.2f}": row["p"] >= SURE,
        },
        numbers={"mean": n, "n": int(row["clips"])},
        unit="features",
    )


CLAIMS = (Claim(name="of {}", rests_on=("activity",), judge=_specialised, per=_domains),)
