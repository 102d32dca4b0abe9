"""Turn what foreign files make libraries raise into CheckpointError, once for all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from cappy_engine.errors import BundleError, CappyError, CheckpointError, is_failure
from cappy_export.checkpoints.naming import shown


@contextlib.contextmanager
def refusing(problem: str) -> Iterator[None]:
    """Raise CheckpointError, which begins with `problem`, for whatever the block raises on a bad file.

    >>> with refusing("my-checkpoint has no usable tokenizer"):
    ...     AutoTokenizer.from_pretrained("my-checkpoint")

    A panic in Rust is one of these errors, though Python does not count it as an Exception. Errors of our own pass, but
    for BundleError, since a checkpoint's file is at fault.
    """
    try:
        yield
    except BaseException as error:
        is_ours = isinstance(error, CappyError) and not isinstance(error, BundleError)
        if is_ours or not is_failure(error):
            raise
        reason = str(error) if isinstance(error, (BundleError, OSError, ValueError)) else repr(error)
        raise CheckpointError(f"{problem}: {shown(' '.join(reason.split()), 400)}") from error
