"""Turn what foreign files make libraries raise into CheckpointError, once for all of them."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from cappy_engine.errors import BundleError, CappyError, CheckpointError, is_failure
from cappy_export.checkpoints.naming import shown

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""How a system says that nothing more can be written."""


def full_disk(error: BaseException) -> OSError | None:
    """Give the system's own error if `error` says that nothing more can be written; None if it says anything else.

    >>> full_disk(RuntimeError("write failed: No space left on device"))
    OSError(28, 'No space left on device')

    Libraries put the system's words or, in Rust, its number into errors of their own kinds.
    """
    for number in FULL:
        words = (f"(os error {number})", os.strerror(number))
        if getattr(error, "errno", None) == number or any(each in str(error) for each in words):
            return OSError(number, os.strerror(number))
    return None


@contextlib.contextmanager
def refusing(problem: str) -> Iterator[None]:
    """Raise CheckpointError, which begins with `problem`, for whatever the block raises on a bad file.

    >>> with refusing("my-checkpoint has no usable tokenizer"):
    ...     AutoTokenizer.from_pretrained("my-checkpoint")

    A panic in Rust is one of these errors, though Python does not count it as an Exception. Errors of our own pass, but
    for BundleError, since a checkpoint's file is at fault. A full disk stays an OSError: no checkpoint is at fault.
    """
    try:
        yield
    except BaseException as error:
        is_ours = isinstance(error, CappyError) and not isinstance(error, BundleError)
        if is_ours or not is_failure(error) or getattr(error, "errno", None) in FULL:
            raise
        if full := full_disk(error):
            raise full from error
        reason = str(error) if isinstance(error, (BundleError, OSError, ValueError)) else repr(error)
        raise CheckpointError(f"{problem}: {shown(' '.join(reason.split()), 400)}") from error
