"""Plan which examples make which training step, and how a step is computed.

Pure: the same seed gives the same steps, on any machine, with any number of processes, after any stop.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cappy_engine.batching import Batch, plan_batches

Rows = npt.NDArray[np.int64]

POOL_STEPS = 64
"""Steps that are sorted by length together: enough for batches of nearly one length, few enough to stay mixed."""


def plan_window(lengths: Rows, groups: Rows, *, batch_size: int, seed: int, epoch: int, window: int = 0) -> list[Rows]:
    """Plan the steps of a window: arrays of rows, each row once, `batch_size` in every step but perhaps one.

    >>> plan_window(np.array([3, 1, 2]), np.array([0, 0, 1]), batch_size=2, seed=0, epoch=0)

    `lengths` and `groups` are (n,) int64. The candidates of a group stay together, since training must learn to tell
    them apart. Groups are shuffled, sorted by length within pools of POOL_STEPS steps, and the steps shuffled again. So
    a step holds pairs of about one length, and little is padded.
    """
    random = np.random.default_rng([seed, epoch, window])
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
    """Count the steps of `epochs` epochs: in each, all but perhaps one have `batch_size` examples.

    >>> count_steps(3, batch_size=2, epochs=2)
    4
    """
    return epochs * -(-examples // batch_size)


def plan_parts(lengths: Rows, *, max_batch_tokens: int) -> list[Batch]:
    """Cut the rows of a step into batches of about equal size: as few as `max_batch_tokens` allows.

    >>> [part.rows.tolist() for part in plan_parts(np.array([4, 4, 4]), max_batch_tokens=8)]
    [[0, 1], [2]]

    The number of processes does not matter, so that one process computes the very batches that several share.
    """
    fewest = len(plan_batches(lengths, max_batch_tokens=max_batch_tokens))
    least, most = min(max_batch_tokens, max(1, int(lengths.sum()) // fewest)), max_batch_tokens
    while least < most:  # find the smallest budget that needs no more batches
        middle = (least + most) // 2
        if len(plan_batches(lengths, max_batch_tokens=middle)) <= fewest:
            most = middle
        else:
            least = middle + 1
    return plan_batches(lengths, max_batch_tokens=most)


def share_of(parts: Sequence[Batch], process: int, processes: int) -> list[tuple[int, Batch]]:
    """Deal a step's batches out: those of one process, each with its number in the step.

    >>> [number for number, _ in share_of(plan_parts(np.array([4, 4, 4]), max_batch_tokens=4), 1, 2)]
    [1]
    """
    return [(number, parts[number]) for number in range(process, len(parts), processes)]


def seed_of(seed: int, step: int, number: int) -> int:
    """Make the seed of the random numbers (dropout) of one batch of a step: the same in whichever process.

    >>> seed_of(0, 1, 0) == seed_of(0, 1, 0) != seed_of(0, 1, 1)
    True
    """
    return int(np.random.SeedSequence([seed, step, number]).generate_state(1, np.uint64)[0] >> np.uint64(1))
