"""Connect to a Ray cluster, and fit actors to it. Knows no rows."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cappy_engine.bulk.ray.slices import SLICE_ROWS
from cappy_engine.bundle import open_bundle
from cappy_engine.checks import check_count, shown
from cappy_engine.errors import CappyError, InstallationError, install_hint, reason_of
from cappy_engine.options import ScorerOptions

MOST_CORES = 8
"""Cores of an actor, where nothing else is asked for."""
SPARE_CPUS = 0.25
"""What an actor leaves of its cores: Ray's own steps would else wait for the actors for ever."""
CONNECT_SECONDS = 10
"""How long a cluster may take to answer. Ray itself tries for a quarter of an hour."""
VARIABLES = {"RAY_gcs_server_port_wait_time_s": "1", "RAY_BACKEND_LOG_LEVEL": "fatal"}
"""What Ray reads while it connects: how often it tries, each time for 40 seconds, and what it logs."""
HOST_AND_PORT = re.compile(r"(?P<host>[^\s:/\[\]]+|\[[0-9a-fA-F:.]+\]):(?P<port>\d{1,5})")


@dataclass(frozen=True)
class ClusterOptions:
    """Where a job runs: on the cluster at `address`, by at most `actors`. A slice has at most `slice_rows`.

    >>> ClusterOptions("10.0.0.1:6379", actors=16)

    "auto" is the cluster that this machine is a node of, or RAY_ADDRESS; "local" starts Ray on this machine. None for
    `actors` is as many as there is room for. Raises ValueError.
    """

    address: str = "auto"
    actors: int | None = None
    slice_rows: int = SLICE_ROWS

    def __post_init__(self) -> None:
        check_address(self.address)
        check_count("slice_rows", self.slice_rows)
        if self.actors is not None:
            check_count("actors", self.actors)


@dataclass(frozen=True)
class Pool:
    """What an actor gets, how many may run, and the options of its scorer."""

    cores: int
    gpus: int
    actors: int
    options: ScorerOptions
    spare_cpus: float = SPARE_CPUS

    def __str__(self) -> str:
        """Say it in a few words."""
        each = _cores(self.cores) + " and a GPU" * bool(self.gpus)
        return f"{self.options.device} on up to {self.actors} actor{'s' * (self.actors > 1)} with {each}"

    def arguments(self, ray: Any) -> dict[str, Any]:
        """Give the arguments of Ray's `map` and `map_batches`.

        >>> dataset.map(SliceActor, **pool.arguments(ray))
        """
        return {
            "compute": ray.data.ActorPoolStrategy(
                min_size=1, initial_size=self.actors, max_size=self.actors, max_tasks_in_flight_per_actor=2
            ),
            "num_cpus": self.cores - self.spare_cpus,
            "num_gpus": self.gpus,
        }


def check_address(address: str) -> str:
    """Return the address of a cluster. Raises ValueError for anything else.

    >>> check_address("10.0.0.1:6379")
    '10.0.0.1:6379'
    """
    if isinstance(address, str) and (address in ("auto", "local") or HOST_AND_PORT.fullmatch(address)):
        return address
    raise ValueError(
        f"{shown(address)} is not the address of a Ray cluster; it is HOST:PORT of the head, 'auto' on a node of the "
        "cluster, or 'local' for this machine alone"
    )


def make_pool(
    ray: Any, bundle: str | Path, options: ScorerOptions, cluster: ClusterOptions, *, leaves_core: bool = False
) -> Pool:
    """Fit the actors to the nodes that there are now. Raises CappyError for a cluster without room for one.

    An actor has `options.threads` cores; without them all of the smallest node, and at most 8. On GPUs it has one, and
    without `options.threads` its share of the node's cores. With `leaves_core` some node has a whole core left, for
    which Ray's reading and writing of files wait: actors ask for less than they use, or there is one actor less.

        >>> make_pool(ray, "cappy-bundle", ScorerOptions(threads=4), ClusterOptions("auto")).actors
        16
    """
    if options.gpus is not None:
        raise ValueError("gpus cannot be chosen by number on a cluster: Ray gives one to each actor")
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = sorted((int(found.get("CPU", 0)), int(found.get("GPU", 0))) for found in resources)
    device = options.device
    if device == "auto":
        has_gpus = any(cpus and gpus for cpus, gpus in nodes)
        device = "cuda" if has_gpus and open_bundle(bundle).manifest.precisions_for("cuda") else "cpu"
    is_gpu = device != "cpu"
    usable = [(cpus, gpus if is_gpu else 1) for cpus, gpus in nodes if cpus and (gpus or not is_gpu)]
    smallest = min((max(1, cpus // parts) for cpus, parts in usable), default=1)
    cores = options.threads or min(smallest, MOST_CORES)
    most = [(cpus, min(cpus // cores, gpus if is_gpu else cpus)) for cpus, gpus in nodes]
    room = sum(actors for _, actors in most)
    if not room:
        wanted = _cores(cores) + " and a GPU" * is_gpu
        found = ", ".join(f"{_cores(cpus)} and {gpus} GPU{'s' * (gpus != 1)}" for cpus, gpus in nodes)
        raise CappyError(f"no node of this Ray cluster has {wanted} for an actor; its nodes have {found}")
    spare = _spare_cpus(most, cores) if leaves_core else SPARE_CPUS
    if spare == cores and room > 1:  # a single actor of one core asks for none
        room, spare = room - 1, SPARE_CPUS
    return Pool(
        cores=cores,
        gpus=int(is_gpu),
        actors=min(room, cluster.actors or room),
        options=replace(options, device=device, threads=cores),
        spare_cpus=spare,
    )


def _spare_cpus(nodes: list[tuple[int, int]], cores: int) -> float:
    """Say what each actor must leave, so that some node has a whole core left.

    `nodes` are the cores of each, and how many actors it takes.
    """
    if any(cpus - actors * (cores - SPARE_CPUS) >= 1 for cpus, actors in nodes):
        return SPARE_CPUS
    return math.ceil(1e4 / max(actors for _, actors in nodes)) / 1e4  # Ray counts in such parts of a core


def _cores(count: int) -> str:
    return f"{count} core{'s' * (count != 1)}"


def node_name() -> str:
    """Name the node that a worker runs on, by its host and Ray's address.

    >>> node_name()
    'gpu-7 (10.0.0.7)'
    """
    import ray

    return f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"


def import_ray() -> Any:
    """Import Ray, with its datasets. Raises InstallationError where it is missing.

    >>> ray = import_ray()
    """
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise InstallationError(
            f"a job on a cluster needs the package {error.name!r}; {install_hint('cpu,ray')}"
        ) from error
    return ray


@contextlib.contextmanager
def connected(ray: Any, address: str) -> Iterator[None]:
    """Connect to a cluster, or start Ray here, unless this process did that before.

        >>> with connected(ray, "auto"):
        ...     nodes = ray.nodes()

    Raises CappyError if no cluster answers.
    """
    if ray.is_initialized():
        yield
        return
    with _while_connecting():
        _connect(ray, address)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def quiet(ray: Any) -> Iterator[None]:
    """Have Ray's datasets log nothing in the block, and draw no bars; errors are raised.

    >>> with quiet(ray):
    ...     rows = dataset.take_all()
    """
    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.CRITICAL)  # an error is raised, too
    try:
        yield
    finally:
        context.enable_progress_bars = before[0]
        logger.setLevel(before[1])


@contextlib.contextmanager
def translated(ray: Any) -> Iterator[None]:
    """Raise CappyError for an error of Ray's, without its traceback.

    >>> with translated(ray):
    ...     rows = dataset.take_all()
    """
    try:
        yield
    except ray.exceptions.RayError as error:
        told = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        problem = told[-1 if isinstance(error, ray.exceptions.RayTaskError) else 0]
        raise CappyError(f"the Ray job failed: {problem}") from error


def _connect(ray: Any, address: str) -> None:
    """Connect, or start Ray for "local". Raises CappyError where nobody answers soon."""
    settings: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == "local":
        ray.init(address="local", include_dashboard=False, **settings)
        return
    named = _named(address)
    place = HOST_AND_PORT.fullmatch(named)
    try:
        if place is not None:
            socket.create_connection((place["host"].strip("[]"), int(place["port"])), CONNECT_SECONDS).close()
        ray.init(address=address, **settings)
    except (OSError, RuntimeError, ValueError, OverflowError) as error:
        told = reason_of(error) or type(error).__name__
        if "AuthToken" in f"{error}{error.__cause__}":
            told = "it asks for a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        raise CappyError(
            f"no Ray cluster answers at {named!r} ({told.splitlines()[0]}); is Ray running there? Start it with: ray "
            "start --head; or name another address, or 'local'"
        ) from error


def _named(address: str) -> str:
    """Find the address that "auto" stands for. If none is written down, Ray looks for its processes."""
    if address != "auto":
        return address
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")  # noqa: S108 - Ray's own place
    named = os.environ.get("RAY_ADDRESS", "")
    with contextlib.suppress(OSError):
        named = named or note.read_text().strip()
    return named or address


@contextlib.contextmanager
def _while_connecting() -> Iterator[None]:
    """Have Ray try once and log nothing to stderr. What this process does at SIGTERM stays."""
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    new = {name: value for name, value in VARIABLES.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)
        if is_main and handler is not None:  # None: it is none of Python's
            signal.signal(signal.SIGTERM, handler)
