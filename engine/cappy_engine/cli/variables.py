"""Give the options of a command environment variables, too: the flag in capitals, behind the command's prefix."""

from __future__ import annotations

import difflib
import os

import click


def add_variables(command: click.Command, prefix: str) -> None:
    """Let every option of a command be given by a variable: --max-pairs by CAPPY_SERVE_MAX_PAIRS.

    >>> add_variables(serve, "CAPPY_SERVE")
    """
    for param in command.params:
        if isinstance(param, click.Option):
            param.envvar = f"{prefix}_{param.opts[0].lstrip('-').replace('-', '_').upper()}"


def check_variables(ctx: click.Context, prefix: str) -> None:
    """Fail for a variable with the prefix that is empty, or that no option has: it would change nothing, silently.

    >>> check_variables(context, "CAPPY_SERVE")
    """
    known = [str(param.envvar) for param in ctx.command.params if param.envvar]
    for name in sorted(os.environ):
        if not name.startswith(f"{prefix}_"):
            continue
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}" if near else f"its variables are {', '.join(known)}"
            ctx.fail(f"no option has the variable {name}; {hint}? Unset it")
        if not os.environ[name]:
            ctx.fail(f"the variable {name} is empty; unset it, or give it a value")
