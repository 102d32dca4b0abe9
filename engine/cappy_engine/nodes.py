"""Open one bundle on the nodes of a cluster: each one checks that it has what the first one has. Knows no cluster."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cappy_engine import __version__
from cappy_engine.bundle import EMBEDDED, open_bundle
from cappy_engine.errors import BundleError, InstallationError
from cappy_engine.options import ScorerOptions
from cappy_engine.scorer import Scorer


@dataclass(frozen=True)
class BundleOfNodes:
    """A bundle that every node opens by itself, at the same path; pickled, it goes to the nodes.

    `path` is None for the package's own bundle. `digest` is the manifest's, which holds the digest of every file.
    """

    path: Path | None
    digest: str
    version: str
    options: ScorerOptions

    @classmethod
    def of(cls, bundle: str | Path, options: ScorerOptions) -> Self:
        """Tell what the nodes must open. Raises BundleError if there is no bundle here.

        >>> BundleOfNodes.of("cappy-bundle", ScorerOptions(precision="int8"))
        """
        found = open_bundle(bundle)
        path = None if found.path == EMBEDDED.resolve() else found.path
        return cls(path, str(found.manifest.document["manifest_sha256"]), __version__, options)

    def open(self, node: str = "") -> Scorer:
        """Open the bundle of this node, if it is the one that was meant; `node` is its name, else the host's.

        >>> scorer = BundleOfNodes.of("cappy-bundle", ScorerOptions()).open()

        Raises what `find` and `Scorer.open` raise.
        """
        return Scorer.open_with(self.find(node), self.options)

    def find(self, node: str = "") -> Path:
        """Find the bundle of this node, if it is the one that was meant.

        >>> path = BundleOfNodes.of("cappy-bundle", ScorerOptions()).find()

        Raises InstallationError for another version of the package, and BundleError for another bundle or none.
        """
        node = node or socket.gethostname()
        if self.version != __version__:
            raise InstallationError(
                f"node {node} has cappy-engine {__version__}, and the job comes from {self.version}; install the "
                "same version on all nodes"
            )
        path = EMBEDDED if self.path is None else self.path
        try:
            found = str(open_bundle(path).manifest.document["manifest_sha256"])
        except BundleError as error:
            raise BundleError(f"node {node}: {error}; every node needs the bundle at {path}, copy it there") from error
        if found != self.digest:
            raise BundleError(
                f"node {node} has another bundle at {path}: the digest of its manifest is {found[:16]}, that of the "
                f"job's is {self.digest[:16]}; copy the job's bundle to every node"
            )
        return path
