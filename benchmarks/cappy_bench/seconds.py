"""Reads the seconds that a program of the benchmarks is given on its command line."""

from __future__ import annotations

import argparse

from cappy_engine.checks import check_number


def read_seconds(text: str) -> float:
    """Read a finite number of seconds, 0 or more.

    >>> read_seconds("7200")
    7200.0

    Raises ArgumentTypeError, whose text argparse shows.
    """
    try:
        return check_number("seconds", float(text), least=0)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
