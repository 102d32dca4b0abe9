"""`cappy`: finds the command that is called, runs it, and turns errors into a line on stderr and an exit status.

Packages name their commands as entry points of the group `cappy.commands`. A command's module is imported when it is
called; all are imported for `cappy --help`.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import click

from cappy_engine import __version__
from cappy_engine.cli.arguments import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE
from cappy_engine.cli.streams import complain
from cappy_engine.errors import CappyError, InstallationError, ParityError

COMMANDS = "cappy.commands"
DISTRIBUTION = "cappy-engine"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    >>> main(["rank", "--instruction", "Is the sky blue?", "--candidate", "Yes", "--candidate", "No"])
    0
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a text must not stop us
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return int(cappy.main(words or ["--help"], "cappy", standalone_mode=False) or EXIT_OK)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "cappy"
        complain(f"{path}: {error.format_message()}\nTry '{path} --help'.")
        return EXIT_USAGE
    except click.Abort:  # interrupted before a command ran
        return EXIT_INTERRUPTED


class Cappy(click.Group):
    """The commands of all installed packages, found by their entry points."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name all commands, in alphabetical order; reads what every installed package says of itself."""
        return sorted(metadata.entry_points(group=COMMANDS).names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command; those of this distribution are found without a look at the others."""
        found = _own_commands().select(group=COMMANDS, name=cmd_name) or metadata.entry_points(
            group=COMMANDS, name=cmd_name
        )
        return next(map(_load, found), None)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List all commands with the whole first sentence of their help, in as many lines as it takes."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, made.get_short_help_str(limit=200)) for name, made in found if made])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error of ours, of a file, or Ctrl-C becomes a line on stderr and an exit status."""
        try:
            return super().invoke(ctx)
        except ParityError as error:
            from cappy_engine.cli.text import describe_parity

            complain(f"{describe_parity(error.report)}\ncappy {ctx.invoked_subcommand}: {error}")
        except BrokenPipeError:  # the reader of our stdout went away (`cappy score ... | head`)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (CappyError, OSError) as error:
            complain(f"cappy {ctx.invoked_subcommand}: {error}")
        except KeyboardInterrupt:
            complain(f"cappy {ctx.invoked_subcommand}: interrupted")
            return EXIT_INTERRUPTED
        return EXIT_ERROR


def _load(entry: metadata.EntryPoint) -> click.Command:
    """Import a command; one that cannot be imported says why when it is called, and does not keep others from help."""
    try:
        loaded: click.Command = entry.load()
        return loaded
    except (ImportError, AttributeError) as error:
        problem = f"the command {entry.name!r} cannot be loaded: {error}"

    def fail() -> None:
        raise InstallationError(problem)

    settings = {"ignore_unknown_options": True, "allow_extra_args": True}
    return click.Command(entry.name, settings, fail, help=f"({problem})", add_help_option=False)


def _own_commands() -> metadata.EntryPoints:
    try:
        return metadata.distribution(DISTRIBUTION).entry_points
    except metadata.PackageNotFoundError:  # a source tree that was not installed
        return metadata.EntryPoints()


@click.group(cls=Cappy, context_settings={"max_content_width": 100}, no_args_is_help=False)
@click.version_option(__version__, message="cappy %(version)s")
def cappy() -> None:
    """Score (instruction, response) pairs with Cappy."""
