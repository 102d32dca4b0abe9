"""Join the processes that a launcher started, after a look at what it told them."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from accelerate import Accelerator, PartialState

from cappy_engine.errors import AdaptError
from cappy_export.adaptation.recipe import choose_mixed_precision

LAUNCHED = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What `accelerate launch` and torchrun put into the environment of every process."""


def check_launch(environment: Mapping[str, str]) -> None:
    """Raise AdaptError if the environment is of one of several processes, but says too little to join them.

    >>> check_launch({})
    >>> check_launch({"LOCAL_RANK": "0"})
    Traceback (most recent call last):
    cappy_engine.errors.AdaptError: LOCAL_RANK is set, as by a launcher of several processes, but RANK, ...

    LOCAL_RANK makes accelerate join others. Without it, it trains alone, which is wrong if there are others.
    """
    found = {name: environment[name] for name in LAUNCHED if environment.get(name, "") != ""}
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT"):
        if name in found and not found[name].removeprefix("-").isdecimal():
            raise AdaptError(f"{name} in the environment must be a whole number, found {found[name]!r}")
    if int(found.get("LOCAL_RANK", -1)) < 0:
        if int(found.get("WORLD_SIZE", 1)) > 1:
            raise AdaptError(
                f"WORLD_SIZE is {found['WORLD_SIZE']}, but LOCAL_RANK is not set: each process would train alone; "
                "start them with accelerate launch or torchrun, or unset WORLD_SIZE"
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


def make_accelerator(asked: str) -> Accelerator:
    """Join the other processes, if a launcher started several, with the mixed precision that was `asked` for.

    >>> make_accelerator("no").num_processes
    1

    Raises AdaptError if they cannot be joined, or the device has not that precision.
    """
    check_launch(os.environ)
    try:
        device = PartialState().device.type
    except Exception as error:  # torch.distributed raises several kinds, its own among them
        raise AdaptError(
            f"the processes of this training cannot find each other ({error}); start them with accelerate launch, or "
            f"unset {', '.join(LAUNCHED)}"
        ) from error
    has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return Accelerator(mixed_precision=choose_mixed_precision(asked, device=device, has_bf16=has_bf16))
