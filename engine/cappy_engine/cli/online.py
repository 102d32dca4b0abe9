"""`cappy serve` and `cappy triton`: a bundle behind HTTP, by our own server or by NVIDIA's."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from cappy_engine.cli.arguments import EXIT_ERROR, bundle_option, command, takes
from cappy_engine.cli.extras import extra
from cappy_engine.cli.standard import held_signals
from cappy_engine.cli.streams import complain, tell
from cappy_engine.cli.values import PATH
from cappy_engine.errors import CappyError, message_of
from cappy_engine.options import ScorerOptions
from cappy_engine.serving.server_options import ServerOptions
from cappy_engine.serving.triton import TritonOptions, write_repository

log = logging.getLogger("cappy.server")


@command(
    """
    examples:
      cappy serve
      cappy serve --bundle cappy-bundle --precision int8 --port 9000
      cappy serve --bundle cappy-bundle --host 0.0.0.0 --api-key-file keys.txt --log-format json
      CAPPY_SERVE_PORT=9000 cappy serve

    every option has a variable: --max-pairs is CAPPY_SERVE_MAX_PAIRS
    signals: SIGTERM answers what was accepted and ends with status 0, a second one ends at once with status 1,
    SIGHUP opens the bundle again
    """,
    variables="CAPPY_SERVE",
)
@bundle_option
@takes(ServerOptions, "server", section="Server")
@takes(ScorerOptions, section="Scorer")
def serve(bundle: Path, server: ServerOptions, options: ScorerOptions) -> None:
    """Answer scoring requests over HTTP."""
    with held_signals() as held:
        _serve(bundle, server, options, held)


def _serve(bundle: Path, server: ServerOptions, options: ScorerOptions, held: list[int]) -> None:
    with extra("cpu,serve"):
        from cappy_engine.serving.http.running import run_server
        from cappy_engine.serving.logs import is_written, start_logging

    start_logging(server.log_format)
    try:
        run_server(bundle, options, server, held)
    except Exception as error:
        if server.log_format == "text" and is_written():  # else nobody reads, and to write would wait for ever
            raise
        is_told = isinstance(error, (CappyError, OSError))
        log.error("%s", message_of(error), exc_info=None if is_told else error)  # noqa: TRY400 - an object a line, the last one too
        raise click.exceptions.Exit(EXIT_ERROR) from error


@command(
    """
    examples:
      cappy triton cappy-bundle models --precision int8
      cappy triton cappy-bundle models --device cuda --gpu 0 --gpu 1 --name cappy-large

    models/cappy takes texts and needs cappy-engine where Triton runs; models/cappy-onnx takes token ids;
    here --device auto is the CPU
    """
)
@click.argument("bundle", type=PATH, metavar="BUNDLE")
@click.argument("repository", type=PATH, metavar="REPO")
@takes(TritonOptions, "triton")
@takes(ScorerOptions, section="Scorer")
def triton(bundle: Path, repository: Path, triton: TritonOptions, options: ScorerOptions) -> None:
    """Write a model repository for NVIDIA's Triton Inference Server.

    REPO is a folder, which may hold other models.
    """
    for folder in write_repository(bundle, repository, options, triton, say=complain):
        tell(f"wrote {folder}")
