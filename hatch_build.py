"""Compile the kernels when the package is built, or go without them: a failing compiler never fails an installation.

`CAPPY_BUILD` chooses the compiler, as engine/cappy_engine/native/build.py says.
"""

from __future__ import annotations

import os
import sys
import tempfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

INSIDE = "cappy_engine/native"
"""The folder of the library in a wheel."""


class KernelsHook(BuildHookInterface[Any]):
    """Put the library, and the note of how it was made, into a wheel; beside the sources where these are used."""

    def dependencies(self) -> list[str]:
        """Name ziglang if it was asked for. Then pip fetches it for the build alone."""
        return ["ziglang"] if _asked().startswith(("zig", "manylinux")) and self.target_name == "wheel" else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; a wheel with a library is for one kind of machine, one without is for all."""
        if self.target_name != "wheel":
            return
        sources = Path(self.root, "engine", INSIDE)
        native = _load(sources / "build.py")
        if version == "editable":
            found = _build_in_place(native, sources)
        else:
            self._scratch = tempfile.TemporaryDirectory()
            out = Path(self._scratch.name)
            found = native.provide(out, _asked())
            build_data["force_include"] |= {str(path): f"{INSIDE}/{path.name}" for path in sorted(out.iterdir())}
        if found.problem:
            self.app.display_warning(f"cappy-engine is installed without its own kernels: {found.problem}")
            return
        self.app.display_info(f"cappy-engine's kernels: {found.compiler}")
        if version != "editable":
            system = f"manylinux_{native.GLIBC.replace('.', '_')}" if _asked().startswith("manylinux-") else "linux"
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{system}_{found.machine}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what the wheel has taken."""
        if hasattr(self, "_scratch"):
            self._scratch.cleanup()


def _build_in_place(native: Any, sources: Path) -> Any:
    """Build beside the sources; where nothing can be written, go without unless a compiler was asked for."""
    try:
        return native.provide(sources, _asked())
    except OSError as error:
        if _asked() != "auto":
            raise
        return native.Built(native.machine(), "", problem=str(error))


def _asked() -> str:
    return os.environ.get("CAPPY_BUILD") or "auto"


def _load(path: Path) -> Any:
    """Load a file of the package alone: what the package needs is not installed yet."""
    spec = spec_from_file_location("cappy_native_build", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be loaded")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
