"""Measures what `cappy bench serve` is asked for; the result is one JSON document."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvloop

from cappy_bench.load.bodies import INFINITY, NATIVE, Dialect
from cappy_bench.load.bounds import judge
from cappy_bench.load.connections import Client, post
from cappy_bench.load.driving import Room, Target
from cappy_bench.load.infinity_server import BATCH, READY, infinity_command, infinity_environment, infinity_versions
from cappy_bench.load.load_options import RESULTS, LoadOptions
from cappy_bench.load.load_steps import Asked, Say, Server, measure_server
from cappy_bench.load.mix import Load, make_load
from cappy_bench.load.offline import Offline
from cappy_bench.load.server_process import (
    CHOSEN,
    Running,
    find_server,
    free_port,
    is_here,
    read_info,
    serve_command,
    start_server,
)
from cappy_bench.machine import current_commit, describe_machine
from cappy_bench.peers.worker import installed
from cappy_bench.speed.texts import choose_pool, read_files
from cappy_engine.bulk.output.output_file import open_output
from cappy_engine.bulk.output.places import check_output
from cappy_engine.bundle import MANIFEST, Bundle, open_bundle
from cappy_engine.errors import BenchmarkError
from cappy_engine.options import ScorerOptions
from cappy_engine.storage import json_bytes, sha256_of
from cappy_engine.tokenizer import PairTokenizer

CONNECTIONS = 32
"""Requests under way at saturation, where no queue is smaller: more only wait longer."""
SCHEMA = "cappy-load-1"
SETTINGS = ("seconds", "overload", "soak", "deadline", "requests", "seed", "connections", "sizes")
VERSIONS = ("cappy-engine", "onnxruntime", "uvicorn", "starlette", "uvloop")
Result = dict[str, Any]


def measure_load(options: LoadOptions, served: Sequence[str], *, say: Say) -> Result:
    """Put a server under load as `options` ask for, write the result, and return it.

    `served` are more options for the server that is started. Raises BenchmarkError if the server or the scorer cannot
    be measured at all, or infinity's checkpoint is not one, BundleError, InvalidLine, and OutputError if there is such
    a file. What a server answers under load is part of the result, also if it is nothing.

        >>> measure_load(LoadOptions(seconds=2.0), [], say=print)["servers"][0]["overload"]["hung"]
        0
    """
    started, clock = datetime.now(UTC), time.monotonic()
    bundle = open_bundle(options.bundle)
    if options.infinity is not None and not (options.infinity / "config.json").is_file():
        raise BenchmarkError(f"--infinity needs a checkpoint's folder, and {options.infinity} has no config.json")
    name = Path(bundle.manifest.document.get("source", {}).get("name") or os.path.realpath(bundle.path)).name
    out = options.out or RESULTS / f"{name}.json"
    read = read_files(options.pairs, options.data, options.bundle, options.infinity)
    for path in filter(None, (out, options.bodies)):
        check_output(path, force=options.force, inputs=read)
        path.parent.mkdir(parents=True, exist_ok=True)
    load = _take_load(options, bundle)
    if options.bodies is not None:
        with open_output(options.bodies, force=options.force, say=say) as file:
            file.writelines(NATIVE.body(pairs) + b"\n" for pairs in load.requests)
    result = {
        "schema": SCHEMA,
        "started": started.isoformat(timespec="seconds"),
        "commit": current_commit(),
        "machine": describe_machine(),
        "versions": dict(installed(name) for name in VERSIONS),
        "settings": {name: getattr(options, name) for name in SETTINGS} | {"served": list(served)},
        "model": {"name": name, "manifest_sha256": sha256_of(bundle.path / MANIFEST)},
        "load": load.describe(),
        **_servers(options, served, load, logs=out.parent, say=say),
    }
    result["seconds"] = round(time.monotonic() - clock, 1)
    with open_output(out, force=options.force, say=say) as file:
        file.write(json_bytes(result))
    say(f"the result is in {out}")
    return result


def _take_load(options: LoadOptions, bundle: Bundle) -> Load:
    """Make the requests that `options` ask for. Raises BenchmarkError if there are too few texts, and InvalidLine."""
    tokenizer = PairTokenizer.from_bytes(bundle.read("tokenizer.json"), max_length=bundle.manifest.max_length)
    texts = choose_pool(options.pairs, options.data, seed=options.seed)
    return make_load(texts, tokenizer, sizes=options.sizes, count=options.requests, seed=options.seed)


def queue_rooms(load: Load, limits: Result) -> list[Room]:
    """Make the rooms of a server's queue. A closed loop then fills the queue, and nothing is refused.

    >>> queue_rooms(load, {"max_queue_pairs": 8192, "max_queue_tokens": 16384})[1].most
    16384
    """
    return [Room(load.sizes, limits["max_queue_pairs"]), Room(load.tokens.tolist(), limits["max_queue_tokens"])]


def _servers(options: LoadOptions, served: Sequence[str], load: Load, *, logs: Path, say: Say) -> Result:
    """Measure ours and, if asked for, infinity's after it; the scorer stays for both."""
    running = (
        find_server(options.url)
        if options.url
        else start_server(serve_command(options.bundle, served), log=logs / "serve.log")
    )
    beside = is_here(running.address[0])
    if not beside:
        say(f"{running.url} is not an address of this machine, so its times are not compared with this one's")
    with contextlib.ExitStack() as at_the_end:
        at_the_end.callback(running.stop)
        info = read_info(running.address)
        say(f"cappy serve is ready: {info['device']}, {info['precision']}, {info['threads']} threads")
        scorer = ScorerOptions(**{name: info[name] for name in CHOSEN})
        offline = Offline(options.bundle, scorer, load, log=logs / "offline.log")
        at_the_end.callback(offline.close)
        seconds = offline.all(range(len(load.requests)))
        per_second = int(load.tokens.sum()) / seconds
        say(f"Scorer.score: {per_second:,.0f} tokens/s")
        batch_ms = info["max_batch_tokens"] / per_second * 1e3
        asked = Asked(options, load, offline, per_second, say)
        servers = [_ours(running, info, asked, batch_ms=batch_ms if beside else None)]
        if options.infinity is not None:
            servers.append(_infinity(options.infinity, asked, threads=info["threads"], logs=logs))
    return {
        "offline": {
            "seconds": round(seconds, 4),
            "tokens_per_second": round(per_second, 1),
            "pairs_per_second": round(sum(load.sizes) / seconds, 1),
            "batch_ms": round(batch_ms, 3),
        },
        "servers": servers,
    }


def _ours(running: Running, info: Result, asked: Asked, *, batch_ms: float | None) -> Result:
    """Measure our server; without `batch_ms` it is on another machine, and no time of this one says what to expect."""
    rooms = () if asked.options.connections else queue_rooms(asked.load, info["limits"])
    found = _measure("cappy serve", running, NATIVE, asked, rooms=rooms, beside_offline=batch_ms is not None)
    place = {"url": running.url, "is_here": batch_ms is not None} if asked.options.url else {}
    return {**found, **place, "info": info, "bounds": judge(found, batch_ms=batch_ms), "end_status": running.stop()}


def _infinity(checkpoint: Path, asked: Asked, *, threads: int, logs: Path) -> Result:
    """A server that cannot be started is part of the result, with the reason."""
    name, port = "infinity", free_port()
    try:
        running = start_server(
            infinity_command(checkpoint, tools=asked.options.tools, port=port),
            log=logs / "infinity.log",
            ready=READY,
            port=port,
            environment=infinity_environment(threads),
        )
    except BenchmarkError as error:
        asked.say(f"{name}: {error}")
        return {"name": name, "status": "skipped", "reason": str(error)}
    try:
        found = _measure(name, running, INFINITY, asked)
        setting = {"setting": f"PyTorch, fp32, batches of {BATCH}", "versions": infinity_versions(asked.options.tools)}
        return {**found, **setting, "end_status": running.stop()}
    finally:
        running.stop()


def _measure(
    name: str,
    running: Running,
    dialect: Dialect,
    asked: Asked,
    *,
    rooms: Sequence[Room] = (),
    beside_offline: bool = False,
) -> Result:
    """Take a server through all steps, in an event loop of its own."""
    client = Client(*running.address)
    requests = [post(running.address, dialect.path, dialect.body(pairs)) for pairs in asked.load.requests]
    server = Server(
        name=name,
        target=Target(client, requests, asked.options.deadline),
        dialect=dialect,
        connections=asked.options.connections or CONNECTIONS,
        rooms=rooms,
        pid=running.pid,
    )

    async def measured() -> Result:
        try:
            return await measure_server(server, asked, beside_offline=beside_offline)
        finally:
            client.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        steps = runner.run(measured())
    return {
        "name": name,
        "status": "ok",
        "ready_seconds": running.ready_seconds,
        "connections": server.connections,
        **steps,
        "sent_again": client.sent_again,
    }
