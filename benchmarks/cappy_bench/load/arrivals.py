"""Says when requests arrive in an open loop: at random times, whatever the server does."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]


def poisson_times(rate: float, seconds: float, *, seed: int) -> Times:
    """Draw the arrivals of a Poisson process: seconds from its start, ascending, on average `rate` a second.

    The gaps are independent and exponential, as those of many users who do not know of each other. The same arguments
    give the same times.

        >>> len(poisson_times(20.0, 60.0, seed=0))
        1196
    """
    random = np.random.default_rng(seed)
    times = np.cumsum(random.exponential(1 / rate, int(rate * seconds) + 1))
    while times[-1] < seconds:
        times = np.concatenate([times, times[-1] + np.cumsum(random.exponential(1 / rate, len(times)))])
    return np.asarray(times[times < seconds])
