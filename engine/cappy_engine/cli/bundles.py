"""`cappy inspect`: what a bundle is."""

from __future__ import annotations

from pathlib import Path

import click

from cappy_engine.bundle import EMBEDDED, open_bundle
from cappy_engine.cli import text
from cappy_engine.cli.arguments import command
from cappy_engine.cli.streams import print_json
from cappy_engine.cli.values import PATH


@command(
    """
    examples:
      cappy inspect cappy-bundle
      cappy inspect cappy-bundle --json
    """
)
@click.argument("bundle", type=PATH, required=False, metavar="[BUNDLE]")
@click.option("--json", "as_json", is_flag=True, help="print the manifest as JSON")
def inspect(bundle: Path | None, as_json: bool) -> None:
    """Print what a bundle is, and how far its scores are from PyTorch's.

    Without BUNDLE it is cappy-mini, the package's own.
    """
    document = open_bundle(bundle or EMBEDDED).manifest.document
    if as_json:
        print_json(document)
    else:
        print(text.describe_manifest(document))
