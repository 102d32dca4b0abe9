"""Compile the native library: the kernels of the operators in the domain `cappy`. Run by path, too.

    python engine/cappy_engine/native/build.py [out folder] [compiler and its arguments...]

Needs a C++17 compiler and nothing else; imports no other module of the engine, which may not be installed yet. Without
arguments the library goes beside its sources, and a note of how it was made, or why not. CAPPY_BUILD says by what:

- `auto` (or nothing): the system's compiler (CXX, c++, g++, clang++), else ziglang if installed, else go without;
- `cc`, `zig`: this one, or it is an error;
- `manylinux-x86_64`, `manylinux-aarch64`: ziglang, for all Linux systems with this processor, or it is an error;
- `none`: no library.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
LIBRARY, NOTE = "libcappy_kernels.so", "build.json"
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Wno-missing-field-initializers"),
)
_AVX512 = ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
ENDINGS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "x86_64": {
        "avx2": ("-mavx2", "-mfma"),
        "avxvnni": ("-mavx2", "-mfma", "-mavxvnni"),
        "avx512": _AVX512,
        "avx512vnni": (*_AVX512, "-mavx512vnni"),
        "avx512bf16": (*_AVX512, "-mavx512bf16"),
        "amx": (*_AVX512, "-mavx512vnni", "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
    },
    "aarch64": {"neon": (), "dotprod": ("-mcpu=generic+dotprod",), "i8mm": ("-mcpu=generic+i8mm",)},
}
"""Flags of the files whose names end in an instruction set (linear_avx2.cpp); the others are for all of a kind."""
EXPORTS = "{ global: RegisterCustomOps; cappy_*; local: *; };\n"
LINK = ("-shared", "-O3", "-pthread", "-Wl,--build-id=none", "-Wl,-z,nodelete")  # threads call it when they end
CHOICES = ("auto", "cc", "zig", "manylinux-x86_64", "manylinux-aarch64", "none")
GLIBC = "2.17"  # the oldest C library that zig's libraries run with, that of 2012
NO_COMPILER = {
    "auto": "there is no C++ compiler (CXX, c++, g++, clang++), and ziglang is not installed",
    "cc": "there is no C++ compiler (CXX, c++, g++, clang++)",
}
NO_ZIG = "ziglang is not installed; run: pip install ziglang"
SECONDS = 900
"""How long a compiler may take for a file. zig's first takes half a minute: it compiles the C library's parts."""


class BuildFailed(Exception):
    """The library was not made; the message is the reason."""


@dataclass(frozen=True)
class Compiler:
    """A compiler: its command, and its name for people."""

    command: tuple[str, ...]
    name: str


@dataclass(frozen=True)
class Built:
    """What came of a build for a `machine`: the `compiler` of the library, or the `problem` why there is none.

    `digest` is that of the sources and flags.
    """

    machine: str
    digest: str
    compiler: str = ""
    problem: str = ""


def provide(out: Path = SOURCES, asked: str = "auto") -> Built:
    """Build the library with an installed compiler, and note the outcome in `out`.

    >>> provide().compiler
    'c++ (Debian 12.2.0-14+deb12u1) 12.2.0'

    With "auto" an up-to-date library in `out` is kept, and a failure is only noted; with a compiler by name a failure
    raises BuildFailed. Raises ValueError for an unknown name, and OSError if `out` cannot be written.
    """
    if asked not in CHOICES:
        raise ValueError(f"CAPPY_BUILD is {asked!r}; choose from {', '.join(CHOICES)}")
    kind = asked.removeprefix("manylinux-") if asked.startswith("manylinux-") else machine()
    found = Built(kind, digest(kind), problem="they were switched off by CAPPY_BUILD=none")
    if asked != "none":
        before = read_note(out) if asked == "auto" and (out / LIBRARY).is_file() else None
        if before and before == replace(found, compiler=before.compiler, problem=""):
            return before
        found = _build_with_any(out, asked, found)
    if found.problem:
        (out / LIBRARY).unlink(missing_ok=True)
    _write_note(out, found)
    if found.problem and asked not in ("auto", "none"):
        raise BuildFailed(found.problem)
    return found


def build(out: Path = SOURCES, compiler: Sequence[str] = ("c++",), flags: Sequence[str] = (), kind: str = "") -> Path:
    """Compile the library into the folder `out`, with a note; returns the library's path.

    >>> build(Path("/tmp"), ["g++"])
    PosixPath('/tmp/libcappy_kernels.so')

    `kind` is the kind of processor ("": this one). Raises BuildFailed, with the compiler's message.
    """
    with tempfile.TemporaryDirectory() as folder:
        kind = kind or machine()
        objects = compile_sources(Path(folder), compiler, flags, kind=kind)
        exports, linked = Path(folder, "exports.map"), Path(folder, LIBRARY)
        exports.write_text(EXPORTS, encoding="utf-8")
        strict = () if flags else ("-Wl,-s", "-Wl,-z,defs")
        # zig's c++ would compile a C++ library first, for a minute; the kernels need none.
        linker = [compiler[0], *("cc" if word == "c++" else word for word in compiler[1:])]
        _run([*linker, *flags, *LINK, *strict, f"-Wl,--version-script={exports}", "-o", str(linked), *objects, "-lm"])
        _write(out / LIBRARY, linked.read_bytes())
        _write_note(out, Built(kind, digest(kind), compiler=" ".join([*compiler, *flags])))
    return out / LIBRARY


def compile_sources(folder: Path, compiler: Sequence[str], flags: Sequence[str] = (), *, kind: str) -> list[str]:
    """Compile the sources for a `kind` of processor, several at once, into `folder`; returns the objects' paths.

    >>> compile_sources(Path("/tmp"), ["g++"], kind="x86_64")[0]
    '/tmp/cpu_features.o'
    """
    from concurrent.futures import ThreadPoolExecutor

    sources = sources_for(kind)
    objects = [str(Path(folder, source.stem)) + ".o" for source in sources]
    # By their names alone: the paths of this machine are not to get into the library.
    commands = [[*compiler, *FLAGS, *flags, *flags_of(source, kind), "-c", source.name] for source in sources]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(_run, ([*command, "-o", made] for command, made in zip(commands, objects, strict=True))))
    return objects


def sources_for(kind: str) -> list[Path]:
    """Find the files to compile for a kind of processor: not those for the instructions of another.

    >>> [path.name for path in sources_for("aarch64")][-1]
    'quantize.cpp'
    """
    others = {name for other, sets in ENDINGS.items() if other != kind for name in sets}
    return [path for path in sorted(SOURCES.glob("*.cpp")) if path.stem.rpartition("_")[2] not in others]


def flags_of(source: Path, kind: str = "") -> Sequence[str]:
    """Find the flags of a source file's instruction set.

    >>> flags_of(Path("linear_avx2.cpp"), "x86_64")
    ('-mavx2', '-mfma')
    """
    return ENDINGS[kind or machine()].get(source.stem.rpartition("_")[2], ())


def read_note(folder: Path = SOURCES) -> Built | None:
    """Read what came of the last build; None where there was none, or the note is damaged.

    >>> read_note().machine
    'x86_64'
    """
    try:
        return Built(**json.loads((folder / NOTE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def machine() -> str:
    """Name this kind of processor; with the system where that is not Linux.

    >>> machine()
    'x86_64'
    """
    import sysconfig

    return sysconfig.get_platform().removeprefix("linux-")


def digest(kind: str, sources: Path = SOURCES) -> str:
    """Digest what a library for a kind of processor is made of: the sources, and the flags.

    >>> digest("x86_64") == digest("aarch64")
    False
    """
    whole = hashlib.sha256(repr((kind, FLAGS, ENDINGS.get(kind), LINK, EXPORTS)).encode())
    for path in sorted([*sources.glob("*.cpp"), *sources.glob("*.h")]):
        whole.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def find_compilers(asked: str, kind: str) -> Iterator[Compiler]:
    """Find the compilers that `asked` allows, in the order in which they are tried."""
    import shlex
    import shutil

    commands = [["c++"], ["g++"], ["clang++"]]
    if asked in ("auto", "cc"):
        with contextlib.suppress(ValueError):  # a quote that is left open: then CXX names no program, either
            commands = [shlex.split(os.environ.get("CXX", "")), *commands]
        if command := next((command for command in commands if command and shutil.which(command[0])), None):
            yield Compiler(tuple(command), _version(command, "--version"))
    if asked != "cc" and (zig := _find_zig()):
        target = f"{kind}-linux-gnu.{GLIBC}"
        yield Compiler((*zig, "c++", "-target", target), f"zig {_version(zig, 'version')} for {target}")


def _build_with_any(out: Path, asked: str, found: Built) -> Built:
    """Try one compiler after the other."""
    if found.machine not in ENDINGS:
        return replace(found, problem=f"there are none for {found.machine}, only for Linux on {' and '.join(ENDINGS)}")
    problems = []
    for compiler in find_compilers(asked, found.machine):
        try:
            build(out, compiler.command, kind=found.machine)
        except (BuildFailed, RuntimeError) as error:  # no more threads can be started
            problems.append(f"{compiler.name} did not compile them: {error}")
        else:
            return replace(found, compiler=compiler.name, problem="")
    return replace(found, problem="; ".join(problems) or NO_COMPILER.get(asked, NO_ZIG))


def _run(command: Sequence[str], seconds: float = SECONDS) -> str:
    """Run a compiler in the sources' folder; returns what it printed. Raises BuildFailed."""
    import subprocess

    with tempfile.TemporaryDirectory() as scratch:
        given = {**os.environ, "LC_ALL": "C", "ZIG_LOCAL_CACHE_DIR": scratch}
        try:
            done = subprocess.run(command, cwd=SOURCES, env=given, capture_output=True, check=False, timeout=seconds)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildFailed(str(error)) from error
    said, complaints = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    if done.returncode:
        what = (complaints or said).strip() or f"it ended with status {done.returncode} and said nothing"
        # gcc 12 warns of its own headers, for thousands of lines; an assembler's error comes behind them.
        start = what.rfind("\n", 0, max(what.lower().find("error:"), 0)) + 1 if len(what) > 2000 else 0
        raise BuildFailed(what[start:][:2000])
    return said


def _version(command: Sequence[str], option: str) -> str:
    """Read the first line of what a compiler says of itself; its command if that is nothing."""
    with contextlib.suppress(BuildFailed):
        if line := _run([*command, option], seconds=60).partition("\n")[0].strip():
            return line
    return " ".join(command)


def _find_zig() -> list[str]:
    """Find ziglang where it can be imported, or beside the Python that pip builds for."""
    import sysconfig

    if find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang"]
    program = Path(sysconfig.get_path("platlib"), "ziglang", "zig")
    return [str(program)] if os.access(program, os.X_OK) else []


def _write_note(out: Path, built: Built) -> None:
    _write(out / NOTE, (json.dumps(asdict(built), indent=1) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    """Write a file at once: a process that has the old one open keeps it, and two may build."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(content)
    Path(file.name).chmod(0o755 if path.suffix == ".so" else 0o644)
    Path(file.name).replace(path)


def main(arguments: Sequence[str]) -> int:
    """Build as the module's docstring says, and say what came of it."""
    try:
        if arguments:
            print(build(Path(arguments[0]).resolve(), arguments[1:] or ("c++",)))
            return 0
        found = provide(SOURCES, os.environ.get("CAPPY_BUILD") or "auto")
    except (BuildFailed, ValueError, OSError) as error:
        print(f"no kernels: {error}", file=sys.stderr)
        return 1
    print(f"no kernels: {found.problem}" if found.problem else f"kernels for {found.machine}, by {found.compiler}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
