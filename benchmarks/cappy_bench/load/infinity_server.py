"""Says how infinity's server is started: in the environment that its runner has, and with the runner's settings."""

from __future__ import annotations

from pathlib import Path

from cappy_bench.load.bodies import INFINITY_MODEL
from cappy_bench.peers.process import ENVIRONMENTS, environment_folder, environment_versions, in_short
from cappy_engine.errors import BenchmarkError

BATCH = 8
"""As in cappy_bench.peers.infinity, which says why."""
PACKAGES = ("infinity-emb", "torch", "fastapi", "uvicorn")
READY = "/health"


def infinity_command(checkpoint: Path, *, tools: Path, port: int) -> list[str]:
    """Write the command that serves a checkpoint with infinity, on PyTorch in float32.

    Raises BenchmarkError, with what to do, where its environment is not set up, or was set up without its server.

        >>> infinity_command(Path("checkpoint"), tools=Path(), port=8001)[:2]
        ['.venv-bench-infinity/bin/infinity_emb', 'v2']
    """
    folder, recipe = environment_folder("infinity", tools), ENVIRONMENTS / "infinity.txt"
    program = folder / "bin" / "infinity_emb"
    if not program.exists() or not list(folder.glob("lib/python*/site-packages/fastapi")):
        raise BenchmarkError(in_short(f"there is no server of infinity in {folder}; how to make it: {recipe}"))
    return [
        *(str(program), "v2", "--model-id", str(checkpoint.resolve()), "--served-model-name", INFINITY_MODEL),
        *("--engine", "torch", "--device", "cpu", "--dtype", "float32", "--batch-size", str(BATCH)),
        *("--no-bettertransformer", "--no-compile", "--no-model-warmup", "--no-trust-remote-code"),
        *("--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"),
    ]


def infinity_versions(tools: Path) -> dict[str, str]:
    """Read the versions of the packages that its answers come from.

    >>> infinity_versions(Path())["infinity-emb"]
    '0.0.78'
    """
    every = environment_versions("infinity", tools)
    return {name: every[name] for name in PACKAGES if name in every}


def infinity_environment(threads: int) -> dict[str, str]:
    """Give the variables that it runs with: as many threads as ours, no network, and no reports to its makers.

    >>> infinity_environment(2)["OMP_NUM_THREADS"]
    '2'
    """
    return {
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)),
        **dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"), "1"),
        "INFINITY_ANONYMOUS_USAGE_STATS": "0",
    }
