"""`cappy serve`: a bundle behind HTTP."""

from __future__ import annotations

from pathlib import Path

from cappy_engine.cli.arguments import bundle_option, command, takes
from cappy_engine.cli.extras import extra
from cappy_engine.options import ScorerOptions
from cappy_engine.serving.server_options import ServerOptions


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
    with extra("cpu,serve"):
        from cappy_engine.serving.http.running import run_server
        from cappy_engine.serving.logs import start_logging

    start_logging(server.log_format)
    run_server(bundle, options, server)
