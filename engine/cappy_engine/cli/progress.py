"""A progress bar on stderr; silent where stderr is not a terminal, and with --quiet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

from cappy_engine.cli.streams import is_quiet


class Show(Protocol):
    """Move a bar to `done` of `total`, and write `text` beside it; `begun` was done before the bar."""

    def __call__(self, done: int, total: int | None, text: str, *, begun: int = 0) -> None: ...


@contextlib.contextmanager
def progress_bar(unit: str = "", *, layout: str | None = None) -> Iterator[Show]:
    """Yield a function that moves the bar; the first call decides `total` and `begun`.

    `layout` is tqdm's `bar_format`.

        >>> with progress_bar("step") as show:
        ...     show(1, 10, "loss 0.3")
    """
    from tqdm import tqdm  # imported here: most commands have no bar, and start sooner without it

    with tqdm(unit=unit, bar_format=layout, leave=False, dynamic_ncols=True, disable=is_quiet() or None) as bar:
        is_new = True

        def show(done: int, total: int | None, text: str, *, begun: int = 0) -> None:
            nonlocal is_new
            if is_new:
                bar.total, bar.n, bar.initial, is_new = total, begun, begun, False
            bar.set_postfix_str(text, refresh=False)
            bar.update(done - bar.n)

        yield show
