"""Changes of tables that are made by hand: one cell's worth of a run goes another way."""

from collections.abc import Callable
from typing import Any

import pandas as pd

Tables = dict[str, pd.DataFrame]


def editor(tables: Callable[[], Tables], concluded: Callable[[Tables], Any]) -> Callable[..., Any]:
    """Makes changes of a run: some numbers of its tables, from which summaries follow anew.

    Args:
        tables: makes the tables as they were.
        concluded: the results that tables make.
    """

    def edit(table: str, query: str, column: str, by: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The change of a column by a function, in the rows that a query finds."""

        def change(run: object) -> Any:
            made = tables()
            rows = made[table].query(query).index
            made[table].loc[rows, column] = by(made[table].loc[rows, column])
            return concluded(made)

        return change

    return edit
