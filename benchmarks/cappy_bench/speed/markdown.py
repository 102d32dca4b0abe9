"""Writes tables in Markdown, and numbers as they stand in them."""

from __future__ import annotations

from collections.abc import Sequence

Row = tuple[str, ...]
MOST_DIGITS = 17


def markdown(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """Write a Markdown table, padded so that it can be read as text too.

    >>> print(markdown(("a", "b"), [("1", "2")]))
    | a   | b   |
    |-----|-----|
    | 1   | 2   |
    """
    cells = [tuple(columns), *[tuple(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows]]
    widths = [max(3, *(len(row[place]) for row in cells)) for place in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def number(value: float) -> str:
    """Write three significant digits, or a whole number.

    >>> number(0.1234), number(1234.5)
    ('0.123', '1,234')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def error(value: float) -> str:
    """Write an error of a score with two significant digits.

    >>> error(0.069), error(8.6e-7)
    ('0.069', '8.6e-07')
    """
    return f"{value:.1e}" if value < 1e-3 else f"{value:.2g}"


def beside(value: float, limit: float, form: str) -> str:
    """Write a value with the digits of `form` ("3f", "2g"), or with more.

    >>> beside(0.951, 0.97, "3f"), beside(0.99496, 0.995, "3f")
    ('0.951', '0.99496')

    It gets more digits where it would read as the limit that it breaks.
    """
    least, kind = int(form[:-1]), form[-1]
    for digits in range(least, MOST_DIGITS):
        written = f"{value:.{digits}{kind}}"
        if float(written) != limit:
            return written
    return repr(value)


def size(count: int) -> str:
    """Write bytes in MB or GB.

    >>> size(1_420_000_000)
    '1.42 GB'
    """
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
