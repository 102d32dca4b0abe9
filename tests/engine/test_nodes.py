"""A node of a cluster opens the bundle that was meant, in the same version, or says what it has."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest

from cappy_engine.bundle import EMBEDDED
from cappy_engine.errors import BundleError, InstallationError
from cappy_engine.nodes import BundleOfNodes
from cappy_engine.options import ScorerOptions


def test_a_bundle_goes_to_the_nodes_by_its_path_and_digest(bundle: Path) -> None:
    meant = BundleOfNodes.of(bundle, ScorerOptions(precision="int8", threads=1))
    with pickle.loads(pickle.dumps(meant)).open() as scorer:
        assert scorer.info.precision == "int8"
    assert BundleOfNodes.of(EMBEDDED, ScorerOptions()).path is None


def test_a_node_with_another_bundle_or_version_is_refused(bundle: Path, tmp_path: Path) -> None:
    meant = BundleOfNodes.of(bundle, ScorerOptions())
    other = BundleOfNodes.of(EMBEDDED, ScorerOptions())
    differs = f"digest of its manifest is {other.digest[:16]}, that of the job's is {meant.digest[:16]}; copy the job's"
    for change, error, problem in (
        ({"path": EMBEDDED}, BundleError, f"node gpu-7 has another bundle at .*: the {differs}"),
        ({"path": tmp_path / "none"}, BundleError, "node gpu-7: .*none.*; every node needs the bundle at .*, copy it"),
        ({"version": "0.0.9"}, InstallationError, "node gpu-7 has .*, and the job comes from 0.0.9; install the same"),
    ):
        with pytest.raises(error, match=problem):
            dataclasses.replace(meant, **change).open("gpu-7")
