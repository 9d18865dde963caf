"""A base and its donors that ran once, for sweeps over several sites; ``run_pair`` makes them."""

from collections.abc import Iterable
from typing import NamedTuple

from ...engine.runs import Runs
from ...errors import InputError


class RunPair(NamedTuple):
    """Runs of a base and of its donor, with what sweeps over some sites read."""

    base: Runs
    donor: Runs | None

    def towards(self, rows: range | None) -> "RunPair":
        """A single base beside each of some donor rows that follow one another.

        None is the base alone, for donors that are no run.
        """
        if rows is None or self.donor is None:
            return RunPair(self.base, None)
        return RunPair(self.base.repeated(len(rows)), self.donor[rows.start : rows.stop])

    def check(self, names: Iterable[str]) -> None:
        """Refuse runs that lack activations.

        Raises:
            InputError: some of these hook points were not kept of either run.
        """
        for runs in self:
            if runs is not None and (lacking := sorted({*names} - {*runs.kept})):
                raise InputError(
                    f"patching between runs that did not keep {lacking[0]}: give run_pair its site."
                )
