"""How a command is made, and what its options may be: click, with what all commands of cappy have in common.

@command('''
    examples:
      cappy count pairs.jsonl
''')
@click.argument("pairs", metavar="PAIRS")
@takes(CountOptions)
def count(pairs: str, options: CountOptions) -> None:
    '''Count the pairs of a file.'''
"""

from __future__ import annotations

import dataclasses
import logging
import math
import textwrap
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from cappy_engine.bundle import EMBEDDED
from cappy_engine.cli.streams import QUIET, VERBOSE, WORDS
from cappy_engine.cli.values import PATH, Checked, Real, Words, json_object
from cappy_engine.cli.variables import add_variables, check_variables
from cappy_engine.options import Asked, Question, questions

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_SKIPPED, EXIT_INTERRUPTED = 0, 1, 2, 3, 130
LONGEST_CHOICES = 60
"""Longer lists of words stand in the text of the help, not before it."""
TAKEN = "cappy_taken"
"""The attribute of a function that holds the classes of its options."""

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


@dataclass(frozen=True)
class Taken:
    """A class of options that a command takes: its parameter's name, the fields that are options, their section."""

    name: str
    cls: type[Any]
    fields: tuple[str, ...]
    section: str


class WithExamples(click.Command):
    """A command whose help ends with examples."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples without wrapping their lines."""
        if self.epilog:
            formatter.write(f"\n{self.epilog}\n")


class Command(WithExamples):
    """A command that builds the objects it `takes` from its options.

    It prints the remarks below its options as they stand. If it has environment variables, their names begin with
    `variables`.
    """

    variables = ""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does; refuse arguments that are left over with a hint, and build the classes of options."""
        given_words = list(args)
        ctx.meta[WORDS] = tuple(args)
        ctx.allow_extra_args = True
        if self.variables and not ctx.resilient_parsing:
            check_variables(ctx, self.variables)
        rest = super().parse_args(ctx, args)
        if ctx.resilient_parsing:  # a shell wants to complete a word
            return rest
        if ctx.args:
            ctx.fail(f"unexpected argument {ctx.args[0]!r}{self._repeat_hint(given_words, ctx.args[0])}")
        for taken in getattr(self.callback, TAKEN, ()):
            values = {field: ctx.params.pop(field) for field in taken.fields}
            try:
                ctx.params[taken.name] = taken.cls(**values)
            except ValueError as error:
                ctx.fail(str(error))
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, section by section."""
        headings = {field: taken.section for taken in getattr(self.callback, TAKEN, ()) for field in taken.fields}
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                sections.setdefault(headings.get(str(param.name)) or "Options", []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def _repeat_hint(self, given_words: Sequence[str], unexpected: str) -> str:
        """Say how several values are given, if `unexpected` follows an option that takes several."""
        before = given_words[: given_words.index(unexpected)] if unexpected in given_words else []
        flag = next((word.partition("=")[0] for word in reversed(before) if word.startswith("-")), "")
        if any(flag in param.opts and param.multiple for param in self.params):
            return f"; repeat the option for each value: {flag} ... {flag} {unexpected}"
        return ""


class Group(WithExamples, click.Group):
    """Commands of a command, such as `cappy evaluate promptsource`."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List all commands with the first sentence of their help. It stands whole, in as many lines as it takes."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, made.get_short_help_str(limit=200)) for name, made in found if made])


def command(
    epilog: str, *, name: str = "", of: click.Group | None = None, variables: str = ""
) -> Callable[[Callable[..., Any]], Command]:
    r"""Make a function a command, `of` a group; its docstring is the help, with `epilog` below the options.

    Without `name` the command has the function's. The function returns None or an exit status. Where `variables` is
    given, each option has an environment variable, whose name begins with it.

        >>> @command("examples:\n  cappy hello")
        ... def hello() -> None:
        ...     '''Greet the world.'''
    """

    def make(function: Callable[..., Any]) -> Command:
        text = textwrap.dedent(epilog).strip()
        made = click.command(name or function.__name__, cls=Command, epilog=text)(function)
        made.params.append(_verbose_option())
        made.variables = variables
        if variables:
            add_variables(made, variables)
        if of is not None:
            of.add_command(made)
        return made

    return make


def group(epilog: str) -> Callable[[Callable[..., Any]], Group]:
    r"""Make a function the head of commands of its own.

    >>> @group("examples:\n  cappy evaluate bigbench samples")
    ... def evaluate() -> None:
    ...     '''Measure how good Cappy's picks are.'''
    """

    def make(function: Callable[..., Any]) -> Group:
        text = textwrap.dedent(epilog).strip()
        made = click.group(function.__name__, cls=Group, epilog=text, no_args_is_help=False)(function)
        made.params.append(_verbose_option())
        return made

    return make


def takes(
    cls: type[Any], name: str = "options", *, only: Collection[str] = (), section: str = ""
) -> Callable[[AnyFunction], AnyFunction]:
    r"""Give a command one option for every field of `cls` annotated with `Asked`.

    `cls` is a dataclass, and the command gets an object of it under `name`. Fields without `Asked` keep their defaults.
    If `only` is given, only the fields in it become options. A ValueError of the class is wrong usage. `section` heads
    the options in the help.

        >>> @command("examples:\n  cappy hello --threads 2")
        ... @takes(ScorerOptions)
        ... def hello(options: ScorerOptions) -> None:
        ...     '''Greet the world.'''
    """
    asked = {field: question for field, question in questions(cls).items() if not only or field in only}

    def decorate(function: AnyFunction) -> AnyFunction:
        for question in reversed(asked.values()):  # decorators are applied from the last one up
            function = _option(question)(function)
        taken = Taken(name, cls, tuple(asked), section)
        setattr(function, TAKEN, (taken, *getattr(function, TAKEN, ())))
        return function

    return decorate


def flags_given(names: Collection[str]) -> list[str]:
    """List the flags of parameters that stand on the running command's command line.

    Only the parameters in `names` are looked at.

    >>> flags_given(["max_new_tokens", "seed"])
    ['--max-new-tokens']
    """
    context = click.get_current_context()
    given = click.core.ParameterSource.COMMANDLINE
    params = [param for param in context.command.params if param.name in names]
    return [param.opts[0] for param in params if context.get_parameter_source(str(param.name)) is given]


def bundle_option(function: AnyFunction) -> AnyFunction:
    """Add --bundle; without it, it is the package's own."""
    text = "a bundle's folder (default: cappy-mini, the package's own)"
    return click.option("--bundle", type=PATH, default=EMBEDDED, metavar="BUNDLE", help=text)(function)


def force_option(function: AnyFunction) -> AnyFunction:
    """Add --force, without which no command writes over what is there."""
    return click.option("--force", is_flag=True, help="replace OUT if it exists")(function)


def quiet_option(function: AnyFunction) -> AnyFunction:
    """Add --quiet, which silences `say` and progress bars."""
    text = "print only warnings and errors to stderr"
    return click.option("--quiet", is_flag=True, expose_value=False, callback=_remember_quiet, help=text)(function)


def _verbose_option() -> click.Option:
    text = "print more to stderr"
    return click.Option(["--verbose"], is_flag=True, expose_value=False, callback=_remember_verbose, help=text)


def _remember_verbose(ctx: click.Context, param: click.Parameter, is_given: bool) -> None:
    if is_given and VERBOSE not in ctx.meta:
        ctx.meta[VERBOSE] = True
        logger = logging.getLogger()
        before = logger.level
        logger.setLevel(logging.INFO)
        ctx.find_root().call_on_close(lambda: logger.setLevel(before))


def _remember_quiet(ctx: click.Context, param: click.Parameter, is_given: bool) -> None:
    if is_given:
        ctx.meta[QUIET] = True


def _option(question: Question) -> Callable[[AnyFunction], AnyFunction]:
    field, kind, how = question.field, question.kind, question.how
    names = [*(how.flag.split() or [f"--{field.name.replace('_', '-')}"]), field.name]
    if kind is bool:
        return click.option(*names, is_flag=True, help=how.help)
    metavar, text = how.metavar, how.help
    if not metavar and len("|".join(how.choices)) > LONGEST_CHOICES:
        metavar, text = "NAME", f"{text}: {', '.join(how.choices)}"
    elif not metavar and kind in (int, float):
        metavar = "NUMBER"
    is_required = field.default is dataclasses.MISSING
    settings: dict[str, Any] = {"required": True} if is_required else {"default": field.default}
    if how.alone:
        settings |= {"is_flag": False, "flag_value": how.alone}
    return click.option(
        *names,
        **settings,
        type=_type(kind, how),
        multiple=question.is_many,
        show_default="default" not in how.help and field.default not in (None, (), ""),
        metavar=metavar or None,
        help=text,
        # click gives an empty tuple where an option that takes several was not given
        callback=(lambda ctx, param, value: value or field.default) if question.is_many else None,
    )


def _type(kind: Any, how: Asked) -> Any:
    """Choose click's type for values of `kind`."""
    if how.choices:
        return Words(how.choices)
    if how.check is not None:
        return Checked(how.check)
    if kind is int:
        return click.IntRange(min=math.ceil(how.least or 0))
    if kind is float:
        return click.FLOAT if how.least is None else Real(min=how.least)
    if kind is Path:
        return PATH
    return json_object if typing.get_origin(kind) in (dict, Mapping) else click.STRING
