"""Join the processes that a launcher started. They then begin and end as one training."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import gather_object

from cappy_engine.bulk.resume.settings import changes
from cappy_engine.errors import AdaptError
from cappy_export.adaptation.recipe import LAUNCHER, choose_mixed_precision

LAUNCHED = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What `accelerate launch` and torchrun put into the environment of every process."""
ELSEWHERE = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Where launchers put the number of processes."""

PR_SET_PDEATHSIG = 1
"""From Linux's prctl.h: the signal that a process gets when the one that started it has ended."""
TURN_SECONDS = 5.0
"""How long a process works until it hears of the others."""

Result = TypeVar("Result")


def check_launch(environment: Mapping[str, str]) -> None:
    """Raise AdaptError if the environment tells of several processes, but not how to join them.

    >>> check_launch({})
    >>> check_launch({"LOCAL_RANK": "0"})
    Traceback (most recent call last):
    cappy_engine.errors.AdaptError: LOCAL_RANK is set, as by a launcher of several processes, but RANK, ...

    LOCAL_RANK makes accelerate join others. Without it, accelerate trains alone, which is wrong if there are others.
    """
    names = {*LAUNCHED, *ELSEWHERE}
    found = {name: environment[name] for name in names if environment.get(name, "") != ""}
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT"):
        if name in found and not found[name].removeprefix("-").isdecimal():
            raise AdaptError(f"{name} in the environment must be a whole number, found {found[name]!r}")
    if int(found.get("LOCAL_RANK", -1)) < 0:
        for name in ELSEWHERE:
            if found.get(name, "1").isdecimal() and int(found.get(name, 1)) > 1:
                raise AdaptError(
                    f"{name} is {found[name]}, but LOCAL_RANK is not set: each process would train alone; start them "
                    f"with torchrun or accelerate launch, or unset {name}"
                )
        if environment.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in found:
            raise AdaptError(
                "accelerate launch --cpu was asked for several processes, and starts one; leave out --cpu and give it "
                "--multi_gpu (on CPUs, too), or use torchrun or --processes"
            )
        return
    missing = [name for name in LAUNCHED if name not in found]
    if missing:
        raise AdaptError(
            f"LOCAL_RANK is set, as by a launcher of several processes, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not; start with accelerate launch or torchrun, or unset LOCAL_RANK"
        )
    if not 0 <= int(found["RANK"]) < int(found["WORLD_SIZE"]):
        raise AdaptError(
            f"RANK is {found['RANK']} and WORLD_SIZE {found['WORLD_SIZE']} in the environment; ranks go from 0 to "
            "WORLD_SIZE - 1"
        )


def join(mixed_precision: str, *, wait_seconds: int) -> Accelerator:
    """Join the other processes, if a launcher started several.

    >>> join("no", wait_seconds=600).num_processes
    1

    The result has the mixed precision that was asked for. The processes wait `wait_seconds` for each other, now and
    whenever they exchange something. Raises AdaptError if they do not come together, if the device does not have that
    precision, or if this process joined with another one before.
    """
    check_launch(os.environ)
    _end_with_launcher()
    is_launched = int(os.environ.get("LOCAL_RANK") or -1) >= 0
    settings: dict[str, Any] = {"timeout": timedelta(seconds=wait_seconds)} if is_launched else {}
    try:
        device = PartialState(cpu=is_launched and not torch.cuda.is_available(), **settings).device.type
    except Exception as error:  # torch.distributed raises several kinds, its own among them
        found = " ".join(f"{name}={os.environ.get(name, '')}" for name in LAUNCHED)
        raise AdaptError(
            f"the {os.environ.get('WORLD_SIZE')} processes of this training do not find each other ({found}; "
            f"{_first_line(error)}); start all of them, or unset {', '.join(LAUNCHED)}"
        ) from error
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        atexit.register(_leave)
    has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    chosen = choose_mixed_precision(mixed_precision, device=device, has_bf16=has_bf16)
    if is_initialized() and (before := AcceleratorState().mixed_precision) != chosen:
        raise AdaptError(f"this process has mixed precision {before} until it ends; start a new process for {chosen}")
    # On CPUs sums must not depend on the order in which gradients were ready: DDP sorts by it, if it may, after a step.
    # Processes compute different numbers of batches, so that no batch may wait for the other processes' buffers.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=device == "cpu", broadcast_buffers=False)
    return Accelerator(mixed_precision=chosen, kwargs_handlers=[ddp])


def together(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Do `work` in every process. If it fails in one, that one raises its error, and the others end quietly.

    >>> together(accelerator, lambda: 3)
    3

    Of several that fail, the first one tells.
    """
    if accelerator.num_processes == 1:
        return work()
    problem, result = None, None
    try:
        result = work()
    except Exception as error:
        problem = error
    failed = [rank for rank, is_failed in enumerate(gather_object([problem is not None])) if is_failed]
    if not failed:
        return result  # type: ignore[return-value]
    if problem is not None and accelerator.process_index == failed[0]:
        raise problem
    raise SystemExit(1)


def finish(accelerator: Accelerator, work: Iterator[None]) -> None:
    """Do `work`, which pauses now and then, in every process, until all are done; see `together` for errors.

    >>> finish(accelerator, iter([None, None]))

    Processes hear of each other every few seconds, so that none waits too long for one that has more to do.
    """
    is_done = False
    while not is_done:
        mine = together(accelerator, functools.partial(_advance, work))
        is_done = mine if accelerator.num_processes == 1 else all(gather_object([mine]))


def agree(accelerator: Accelerator, facts: Mapping[str, Any]) -> None:
    """Raise AdaptError in the main process if another one knows other `facts`; the others end quietly then.

    >>> agree(accelerator, {"seed": 0})
    """
    every = gather_object([dict(facts)]) if accelerator.num_processes > 1 else []
    for rank, others in enumerate(every):
        difference = changes(every[0], others)
        if difference:
            refuse(
                accelerator,
                f"process {rank} cannot join process 0 ({difference}); start all processes with the same command, "
                "data and versions",
            )


def refuse(accelerator: Accelerator, problem: str) -> NoReturn:
    """Raise AdaptError in the main process; the others, which know the same problem, end quietly.

    >>> refuse(accelerator, "the loss of step 2 is nan")
    Traceback (most recent call last):
    cappy_engine.errors.AdaptError: the loss of step 2 is nan
    """
    if accelerator.is_main_process:
        raise AdaptError(problem)
    raise SystemExit(1)


@contextlib.contextmanager
def not_alone(accelerator: Accelerator, way_on: Callable[[], str] = lambda: "--resume") -> Iterator[None]:
    """Raise AdaptError where another process has ended or is silent: nobody can go on without it.

    The error names the options with which the training goes on, which `way_on` gives.

    >>> with not_alone(accelerator):
    ...     accelerator.wait_for_everyone()
    """
    try:
        yield
    except RuntimeError as error:
        is_of_others = isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
        if accelerator.num_processes == 1 or not is_of_others:
            raise
        raise AdaptError(
            f"another process of this training has ended, or is silent ({_first_line(error)}); this one "
            f"({accelerator.process_index} of {accelerator.num_processes}) ends, too; go on with {way_on()}"
        ) from error


def _leave() -> None:
    """Leave the other processes while Python still works.

    Else gloo's threads may drop their last tensors when it does not. That aborts the process: its status is 134 then,
    not the error's (https://github.com/pytorch/pytorch/pull/179291). They end with their group, which the model holds,
    too. The model is in a cycle of references.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()


def _end_with_launcher() -> None:
    """End when `cappy adapt --processes` does, however it does: nobody else would end this process.

    By SIGKILL, since a process that waits for others in C hears no other signal. What was saved outlives that.
    """
    launcher = os.environ.pop(LAUNCHER, "")
    if not launcher.isdecimal() or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it ended before this could be asked for
        raise SystemExit(1)


def _advance(work: Iterator[None]) -> bool:
    """Work for some seconds; True if all is done."""
    until = time.monotonic() + TURN_SECONDS
    return all(time.monotonic() < until for _ in work)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0][:200]
