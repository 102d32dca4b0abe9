"""Compile the native library: the kernels of the operators in the domain `cappy`.

Needs a C++17 compiler and nothing else. Also run by path, where the package is not installed yet: imports no other
module of the engine.

    python engine/cappy_engine/native/build.py [out folder] [compiler and its arguments...]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent
LIBRARY = "libcappy_kernels.so"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-missing-field-initializers",
)
SETS = {
    "avx2": ("-mavx2", "-mfma"),
    "avx512vnni": ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
}
"""Flags of the files whose names end in an instruction set (linear_avx2.cpp); the others are for any x86-64."""


def build(out: Path = SOURCES, compiler: Sequence[str] = ("c++",), flags: Sequence[str] = ()) -> Path:
    """Compile the library into the folder `out`; returns its path.

    >>> build(Path("/tmp"), ["g++"])
    PosixPath('/tmp/libcappy_kernels.so')

    Raises OSError without such a compiler, CalledProcessError (with the compiler's `stderr`) where it fails.
    """
    sources = sorted(SOURCES.glob("*.cpp"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        commands = [
            [*compiler, *FLAGS, *flags, *flags_of(source), "-c", str(source), "-o", str(made)]
            for source, made in zip(sources, objects, strict=True)
        ]
        list(pool.map(_run, commands))
        linked = Path(folder) / LIBRARY
        _run([*compiler, *flags, "-shared", "-o", str(linked), *map(str, objects)])
        out.mkdir(parents=True, exist_ok=True)
        beside = out / f".{LIBRARY}.new"
        beside.write_bytes(linked.read_bytes())
        beside.chmod(0o755)
        return beside.replace(out / LIBRARY)  # at once: a process that has the old one open keeps it


def flags_of(source: Path) -> Sequence[str]:
    """Find the flags of a source file's instruction set.

    >>> flags_of(Path("linear_avx2.cpp"))
    ('-mavx2', '-mfma')
    """
    return SETS.get(source.stem.rpartition("_")[2], ())


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


if __name__ == "__main__":
    try:
        print(build(*map(Path, sys.argv[1:2]), *([sys.argv[2:]] if sys.argv[2:] else [])))
    except subprocess.CalledProcessError as failed:
        sys.exit(failed.stderr)
