"""Plan which examples make which training step.

Pure: the same seed gives the same steps, on any machine, after any stop.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]

POOL_STEPS = 64
"""Steps that are sorted by length together: enough for batches of nearly one length, few enough to stay mixed."""


def plan_epoch(lengths: Rows, groups: Rows, *, batch_size: int, seed: int, epoch: int) -> list[Rows]:
    """Plan the steps of one epoch: arrays of rows, each row once, `batch_size` in every step but perhaps one.

    >>> plan_epoch(np.array([3, 1, 2]), np.array([0, 0, 1]), batch_size=2, seed=0, epoch=0)

    `lengths` and `groups` are (n,) int64. The candidates of a group stay together, since training must learn to tell
    them apart. Groups are shuffled, sorted by length within pools of POOL_STEPS steps, and the steps shuffled again. So
    a step holds pairs of about one length, and little is padded.
    """
    random = np.random.default_rng([seed, epoch])
    _, group_of = np.unique(groups, return_inverse=True)
    longest = np.zeros(group_of.max() + 1, dtype=np.int64)
    np.maximum.at(longest, group_of, lengths)
    order = np.argsort(random.permutation(len(longest))[group_of], kind="stable")  # whole groups, shuffled
    steps: list[Rows] = []
    for start in range(0, len(order), POOL_STEPS * batch_size):
        pool = order[start : start + POOL_STEPS * batch_size]
        pool = pool[np.argsort(longest[group_of[pool]], kind="stable")]
        steps += [pool[first : first + batch_size] for first in range(0, len(pool), batch_size)]
    return [steps[place] for place in random.permutation(len(steps))]


def count_steps(examples: int, *, batch_size: int, epochs: int) -> int:
    """Count the steps that `plan_epoch` plans in `epochs` epochs.

    >>> count_steps(3, batch_size=2, epochs=2)
    4
    """
    return epochs * -(-examples // batch_size)


def plan_steps(
    lengths: Rows, groups: Rows, *, batch_size: int, seed: int, epochs: int, done: int = 0
) -> Iterator[tuple[int, Rows]]:
    """Yield (number from 1, rows) of every step of the training but the first `done`.

    >>> steps = plan_steps(np.array([3, 1, 2]), np.array([0, 0, 1]), batch_size=2, seed=0, epochs=2, done=1)
    >>> [number for number, rows in steps]
    [2, 3, 4]
    """
    number = 0
    for epoch in range(epochs):
        for rows in plan_epoch(lengths, groups, batch_size=batch_size, seed=seed, epoch=epoch):
            number += 1
            if number > done:
                yield number, rows
