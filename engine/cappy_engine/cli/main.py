"""`cappy`: finds the command that is called, runs it, and turns errors into a line on stderr and an exit status.

Packages name their commands as entry points of the group `cappy.commands`. A command's module is imported when it is
called; all are imported for `cappy --help`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import click

from cappy_engine import __version__
from cappy_engine.cli.arguments import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, Group
from cappy_engine.cli.standard import Terminated, ended_by, raised_signals, silence, standard_streams
from cappy_engine.cli.streams import CleanFormatter, complain
from cappy_engine.errors import CappyError, InstallationError, ParityError, message_of

COMMANDS = "cappy.commands"
DISTRIBUTION = "cappy-engine"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    >>> main(["rank", "--instruction", "Is the sky blue?", "--candidate", "Yes", "--candidate", "No"])
    0
    """
    with standard_streams(), raised_signals():
        handler = logging.StreamHandler()
        handler.setFormatter(CleanFormatter("%(levelname)s: %(message)s"))
        logging.basicConfig(handlers=[handler], level=logging.WARNING)
        words = list(sys.argv[1:] if argv is None else argv)
        with _Explained(lambda: "cappy") as explained:
            try:
                status = int(cappy.main(words or ["--help"], "cappy", standalone_mode=False) or EXIT_OK)
                sys.stdout.flush()
                return status
            except click.UsageError as error:
                path = error.ctx.command_path if error.ctx else "cappy"
                complain(f"{path}: {error.format_message()}\nTry '{path} --help'.")
                return EXIT_USAGE
            except click.Abort:  # interrupted before a command ran
                return EXIT_INTERRUPTED
        return explained.status


class _Explained:
    """Turns errors and signals into a line on stderr and an exit status.

    The errors are our own and those of files.
    """

    def __init__(self, command: Callable[[], str]) -> None:
        self.status = EXIT_ERROR
        self._command = command  # which one is known when it was called

    def __enter__(self) -> _Explained:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        error = None if error is None else ended_by(error)
        if isinstance(error, BrokenPipeError):  # the reader of our stdout went away (`cappy score ... | head`)
            silence(sys.stdout)
            return True
        if isinstance(error, ParityError):
            from cappy_engine.cli.text import describe_parity

            complain(describe_parity(error.report))
        if isinstance(error, (CappyError, OSError)):
            complain(f"{self._command()}: {message_of(error)}")
        elif isinstance(error, KeyboardInterrupt):
            complain(f"{self._command()}: interrupted")
            self.status = EXIT_INTERRUPTED
        elif isinstance(error, Terminated):
            complain(f"{self._command()}: ended by {error.name}")
            self.status = int(error.code or EXIT_ERROR)
        else:
            return False
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            return True
        silence(sys.stdout)  # what it still holds cannot be written
        return True


class Cappy(Group):
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

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find the command, and note its name before it is imported: a signal may come meanwhile."""
        ctx.invoked_subcommand = args[0]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error of ours, of a file, or Ctrl-C becomes a line on stderr and an exit status."""
        with _Explained(lambda: f"cappy {ctx.invoked_subcommand}") as explained:
            status = super().invoke(ctx)
            sys.stdout.flush()
            return status
        return explained.status


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
