"""Measures `cappy adapt` at scale: memory by rows, and how close several processes are to one.

    python -m cappy_bench.studies.training_scale memory [--rows 50000 500000]
    python -m cappy_bench.studies.training_scale processes CHECKPOINT TRAIN.jsonl [--rows 2000] [--processes 2]

`memory` writes shards of short pairs, and reads them as a training does: the scan, then the windows of an epoch, with
tokens, and a batch of every step, but no model. Each size has a process of its own, and its peak is told.

`processes` trains on the first rows with one process and with several, with the same options, and compares the losses
and gradient norms of the first 20 steps, and the held-out figures. Both get `--options "--max-steps 20"`.

The last line of the output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from cappy_bench.machine import describe_machine
from cappy_bench.memory import peak_bytes
from cappy_engine.bulk.formats.json_lines import json_line, open_lines
from cappy_engine.cli.extras import extra
from cappy_engine.errors import BenchmarkError
from cappy_engine.overlap import ahead
from cappy_export.adaptation.log import LOG

SHARDS = 20
STEPS = 20
WORDS = "shop bicycle question answer river stone early window number garden paper light".split()


def _write_shards(folder: Path, rows: int) -> None:
    """Write `rows` rows into SHARDS files: four candidates to each instruction, about 60 tokens a pair."""
    for shard in range(SHARDS):
        with (folder / f"rows-{shard:03}.jsonl").open("wb") as file:
            for row in range(shard * rows // SHARDS, (shard + 1) * rows // SHARDS):
                words = [WORDS[(row // 4 * 7 + place * place) % len(WORDS)] for place in range(8 + row // 4 % 60)]
                fields = {
                    "instruction": f"{row // 4}: {' '.join(words)}",
                    "response": WORDS[row % 12],
                    "label": row % 2,
                }
                file.write(json_line(fields))


def _read_as_training(folder: Path, checkpoint: Path) -> dict[str, Any]:
    """Read the shards in `folder` as a training does; returns the peak of this process, examples and seconds."""
    from cappy_export.adaptation.model_setup import pair_tokenizer
    from cappy_export.adaptation.scanning import Counted, choose, count
    from cappy_export.adaptation.schedule import plan_parts
    from cappy_export.adaptation.shards import find_shards
    from cappy_export.adaptation.stream import Cursor, Stream
    from cappy_export.checkpoints.checkpoint import open_checkpoint

    begun, shards, found = time.monotonic(), find_shards(folder), Counted()
    for _ in count(shards, range(len(shards)), seed=0, found=found):
        pass
    scan = choose([found], 0.02, source=str(folder))
    scanned = time.monotonic()
    encoder, pad_token_id = pair_tokenizer(open_checkpoint(checkpoint), 512)
    stream = Stream(shards, encoder.encode, scan.examples, scan.threshold, window=65536, batch_size=128, seed=0)
    tokens = 0
    with ahead(stream.windows(Cursor(), 1)) as windows:
        for step in stream.steps(windows, done=0):
            for part in plan_parts(step.window.lengths[step.rows], max_batch_tokens=4096):
                inputs = step.window.inputs(step.rows[part.rows], part.length, pad_token_id=pad_token_id)
                tokens += int(inputs["attention_mask"].sum())
    return {
        "examples": scan.examples,
        "tokens": tokens,
        "scan_seconds": round(scanned - begun, 1),
        "read_seconds": round(time.monotonic() - scanned, 1),
        "peak_bytes": peak_bytes(),
    }


def _measure_memory(rows: Sequence[int], checkpoint: Path) -> dict[str, Any]:
    """Measure the peaks of processes that read so many rows."""
    found: dict[str, Any] = {}
    for size in rows:
        with tempfile.TemporaryDirectory() as folder:
            _write_shards(Path(folder), size)
            command = [sys.executable, "-m", "cappy_bench.studies.training_scale", "read", folder]
            done = subprocess.run(  # noqa: S603
                [*command, "--checkpoint", str(checkpoint)], capture_output=True, text=True, check=True
            )
        found[str(size)] = json.loads(done.stdout)
        print(f"{size} rows: peak {found[str(size)]['peak_bytes'] / 2**20:.0f} MiB")
    peaks = [each["peak_bytes"] for each in found.values()]
    return {"rows": found, "difference_bytes": max(peaks) - min(peaks)}


def _compare_processes(checkpoint: str, train: Path, rows: int, processes: int, words: Sequence[str]) -> dict[str, Any]:
    """Train with one process and with several on the first rows of `train`; compare what their logs say.

    Raises BenchmarkError if one of them fails.
    """
    logs = []
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "train.jsonl"
        with open_lines(train) as lines:
            first.write_bytes(b"".join(islice(lines, rows)))
        for count in (1, processes):
            out = Path(folder) / f"by-{count}"
            command = [sys.executable, "-m", "cappy_engine", "adapt", checkpoint, str(first), str(out), "--log-every=1"]
            done = subprocess.run(  # noqa: S603
                [*command, f"--processes={count}", *words], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise BenchmarkError(f"the training with {count} processes failed: {done.stderr.strip()}")
            print(done.stderr.strip())
            logs.append([json.loads(line) for line in (out / LOG).read_bytes().splitlines()])
    return _compare_logs(*logs)


def _compare_logs(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compare two logs: the largest relative differences in the first steps, and the held-out figures of both."""
    found: dict[str, Any] = {}
    for name in ("loss", "gradient_norm"):
        steps = [[entry[name] for entry in log if "gradient_norm" in entry][:STEPS] for log in (one, other)]
        pairs = list(zip(*steps, strict=True))
        found[name] = max((abs(a - b) / max(abs(a), 1e-12) for a, b in pairs), default=math.nan)
        found["steps"] = len(pairs)
    for name in ("held_out_loss", "held_out_accuracy"):
        found[name] = [[entry[name] for entry in log if name in entry] for log in (one, other)]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    memory, read = commands.add_parser("memory"), commands.add_parser("read")
    memory.add_argument("--rows", type=int, nargs="+", default=[50_000, 500_000])
    read.add_argument("folder", type=Path)
    for each in (memory, read):
        each.add_argument("--checkpoint", type=Path, default=Path("export/cappy_mini/checkpoint"))
    processes = commands.add_parser("processes")
    processes.add_argument("checkpoint")
    processes.add_argument("train", type=Path)
    processes.add_argument("--rows", type=int, default=2000)
    processes.add_argument("--processes", type=int, default=2)
    processes.add_argument("--options", default="", help="options of cappy adapt, in one word")
    options = parser.parse_args(argv)
    with extra("cpu,export,train"):
        if options.command == "read":
            print(json.dumps(_read_as_training(options.folder, options.checkpoint)))
            return
        if options.command == "memory":
            found = _measure_memory(options.rows, options.checkpoint)
        else:
            words = shlex.split(options.options)
            found = _compare_processes(options.checkpoint, options.train, options.rows, options.processes, words)
    print(json.dumps({"machine": describe_machine(), **found}))


if __name__ == "__main__":
    main()
