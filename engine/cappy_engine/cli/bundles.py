"""`cappy inspect` and `cappy slim`: what a bundle holds, and how it holds less."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from cappy_engine.bundle import EMBEDDED, PRECISIONS, TARGETS, Bundle, open_bundle
from cappy_engine.cli import text
from cappy_engine.cli.arguments import command, force_option
from cappy_engine.cli.streams import complain, print_json, show, tell
from cappy_engine.cli.values import PATH, Words
from cappy_engine.errors import BundleError
from cappy_engine.slim import slim as keep_only


@command(
    """
    examples:
      cappy inspect cappy-bundle
      cappy inspect cappy-bundle --json
    """
)
@click.argument("bundle", type=PATH, default=EMBEDDED, metavar="[BUNDLE]")
@click.option("--json", "as_json", is_flag=True, help="print the manifest as JSON")
def inspect(bundle: Path, as_json: bool) -> None:
    """Print what a bundle is, and how far its scores are from PyTorch's.

    Without BUNDLE it is cappy-mini, the package's own.
    """
    found = _open(bundle)
    if as_json:
        print_json(found.manifest.document)
        return
    try:
        described = text.describe_manifest(found.manifest.document)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise BundleError(
            f"the manifest of {bundle} lacks what is shown here ({error!r}); --json prints what it has"
        ) from error
    show(described)


@command(
    """
    examples:
      cappy slim cappy-bundle --keep int8 --out cappy-int8
      cappy slim cappy-bundle --keep int8
      cappy slim cappy-bundle --target cpu --keep fp32 --keep int8

    the models that stay are not touched; their scores, digests and parity are as before
    """
)
@click.argument("bundle", type=PATH, metavar="BUNDLE")
@click.option(
    "--keep",
    "precisions",
    type=Words(PRECISIONS),
    multiple=True,
    help="a precision to keep; repeat for several (default: all)",
)
@click.option(
    "--target",
    "targets",
    type=Words(list(TARGETS)),
    multiple=True,
    help="a device whose models are kept; repeat for several (default: all)",
)
@click.option("--out", type=PATH, metavar="OUT", help="folder to write; without it BUNDLE itself is changed")
@force_option
def slim(bundle: Path, precisions: Sequence[str], targets: Sequence[str], out: Path | None, force: bool) -> None:
    """Remove the models from a bundle that a machine does not need.

    Needs no PyTorch. What is removed can only be exported again.
    """
    if not (precisions or targets):
        raise click.UsageError("name what is kept: --keep int8, or --target cpu")
    if force and out is None:
        raise click.UsageError("--force replaces OUT; name it with --out")
    before = _open(bundle).manifest.document["files"]
    after = keep_only(bundle, precisions=precisions or None, targets=targets or None, out=out, force=force)["files"]
    tell(f"removed {', '.join(sorted(before.keys() - after.keys())) or 'nothing'}")
    tell(f"wrote {out or bundle}, {_megabytes(after)} instead of {_megabytes(before)}")


def _open(path: Path) -> Bundle:
    """Open a bundle, and say which models were left out of it."""
    found = open_bundle(path)
    for problem in found.missing.values():
        complain(f"note: {problem}")
    return found


def _megabytes(files: dict[str, dict[str, int]]) -> str:
    return f"{sum(entry['bytes'] for entry in files.values()) / 1e6:.1f} MB"
