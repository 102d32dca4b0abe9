"""`cappy`: arguments in, calls out. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence

from cappy_bench.candidates import sample_commands
from cappy_bench.quality import evaluate_commands
from cappy_engine import __version__
from cappy_engine.cli import scoring, text
from cappy_engine.cli.arguments import EXIT_ERROR, say
from cappy_engine.errors import CappyError, ParityError
from cappy_export import cli as build_commands


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a text must not stop us
    options = _parser().parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO if options.verbose else logging.WARNING)
    try:
        return int(options.run(options))
    except ParityError as error:
        say(f"{text.describe_parity(error.report)}\ncappy {options.command}: {error}")
    except CappyError as error:
        say(f"cappy {options.command}: {error}")
    except BrokenPipeError:  # the reader of our stdout went away (`cappy score ... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        say(f"cappy {options.command}: {error}")
    except KeyboardInterrupt:
        say(f"cappy {options.command}: interrupted")
        return 130
    return EXIT_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cappy", description="Score (instruction, response) pairs with Cappy.")
    parser.add_argument("--version", action="version", version=f"cappy {__version__}")
    parser.set_defaults(verbose=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (build_commands, scoring, sample_commands, evaluate_commands):
        module.add_commands(commands)
    return parser
