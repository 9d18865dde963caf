"""Items of several labels that are alike in something else, such as their duration."""

import numpy as np
from jaxtyping import Float, Int


def matched(
    values: Float[np.ndarray, " item"], labels: Int[np.ndarray, " item"], width: float
) -> Int[np.ndarray, " kept"]:
    """The most items that can be put together, one of each label, with values so far apart.

    What tells labels by the value alone is then within ``width`` of a draw.

    Args:
        values: of the items.
        labels: of these.
        width: between the lowest and the highest value of those that are put together, at most.

    Returns:
        Their indices, in order.
    """
    queues = [
        sorted(np.flatnonzero(labels == one).tolist(), key=lambda i: float(values[i]))
        for one in np.unique(labels)
    ]
    at, kept = [0] * len(queues), list[int]()
    while queues and all(i < len(queue) for i, queue in zip(at, queues, strict=True)):
        heads = [queue[i] for i, queue in zip(at, queues, strict=True)]
        lowest = min(range(len(heads)), key=lambda label: float(values[heads[label]]))
        if max(float(values[i]) for i in heads) - float(values[heads[lowest]]) <= width:
            kept += heads
            at = [i + 1 for i in at]
        else:
            # Nothing of the others is near enough to this one, nor to any below it.
            at[lowest] += 1
    return np.array(sorted(kept), np.int64)
