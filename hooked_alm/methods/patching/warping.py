"""The best warping path between two sequences of vectors (block S-4)."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def dtw_indices(
    base: Float[Tensor, "base_pos d"], donor: Float[Tensor, "donor_pos d"]
) -> list[int]:
    """Indices of donor rows: for each base row the middle of its stretch of the best warping path.

    Of two in the middle, the earlier is taken. Cost is the cosine distance; steps are (1,0), (0,1),
    (1,1).

    Source: Sakoe & Chiba 1978.
    """
    a = torch.nn.functional.normalize(base.float(), dim=-1)
    b = torch.nn.functional.normalize(donor.float(), dim=-1)
    total = path_costs((1 - a @ b.T).cpu().numpy())
    i, j = len(a) - 1, len(b) - 1
    stretches: list[list[int]] = [[] for _ in range(len(a))]
    while i >= 0 and j >= 0:
        stretches[i].append(j)
        # The diagonal first: on a tie, the shorter path.
        moves = {(1, 1): total[i, j], (1, 0): total[i, j + 1], (0, 1): total[i + 1, j]}
        di, dj = min(moves, key=lambda move: moves[move])
        i, j = i - di, j - dj
    return [stretch[len(stretch) // 2] for stretch in stretches]


def path_costs(cost: Float[np.ndarray, "row column"]) -> Float[np.ndarray, "row_end column_end"]:
    """Cost of the best path to every cell, at one index more each; infinite at the border.

    Cells of one anti-diagonal depend on the two before it alone, and are computed together. Each
    costs its own plus the least of three, as cell by cell, to the last bit.
    """
    n, m = cost.shape
    total = np.full((n + 1, m + 1), np.inf)
    total[0, 0] = 0.0
    flat, own = total.reshape(-1), cost.astype(np.float64).reshape(-1)
    for diagonal in range(n + m - 1):
        first, last = max(0, diagonal - m + 1), min(diagonal, n - 1)
        length, column = last - first + 1, diagonal - first
        # One row down and one column back is m entries on in a table of m + 1 columns.
        at = (first + 1) * (m + 1) + column + 1
        before, above, left = (
            flat[at - back : at - back + length * m : m] for back in (m + 2, m + 1, 1)
        )
        here, step = first * m + column, max(m - 1, 1)
        least = np.minimum(np.minimum(before, above), left)
        flat[at : at + length * m : m] = own[here : here + length * step : step] + least
    return total
