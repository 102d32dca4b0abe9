"""Start a training in several processes on this machine, as torchrun does. If one ends badly, all are ended."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from cappy_engine.cpu.cores import usable_cores
from cappy_engine.errors import AdaptError
from cappy_export.adaptation.recipe import LAUNCHER

ENDED_BY_US = ("SIGTERM", "SIGINT")
"""Signals that the launcher sends to the others."""


def start_processes(words: Sequence[str], *, processes: int) -> int:
    """Run the command line `words` in so many processes that train together; returns the exit status.

        >>> start_processes(["adapt", "my-checkpoint", "train.jsonl", "my-cappy"], processes=2)
        0

    Each gets its share of the cores, unless OMP_NUM_THREADS says otherwise. Raises AdaptError if one is killed.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we say ourselves who ended, and how
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="cappy",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",  # a container's own name may lead nowhere
        max_restarts=0,
        monitor_interval=0.1,
    )
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        elastic_launch(config, sys.executable)("-m", "cappy_engine", *words)
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        raise SystemExit(128 + error.sigval) from error
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            if failure.exitcode < 0 and failure.signal_name() not in ENDED_BY_US:
                raise AdaptError(
                    f"process {rank} of {processes} was ended by {failure.signal_name()}, and so were the others; go "
                    "on with the same command and --resume"
                ) from error
        return 1  # the process that failed has told why
    finally:
        del os.environ[LAUNCHER]
    return 0
