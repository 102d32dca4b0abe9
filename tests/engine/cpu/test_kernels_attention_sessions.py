"""Attention of the native library in a session of ONNX Runtime, whole and cut among threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cappy_engine.native import reference
from cappy_engine.native.build import LIBRARY, SOURCES
from cappy_engine.native.library import NativeLibrary
from cappy_engine.native.operands import Floats, Ids, draw_angles
from cappy_engine.session import load_runtime
from tests.support.onnx_files import write_attention_model

CLOSE = 1e-5


def packed_rows(lengths: Ids, hidden: int) -> Floats:
    """Make queries, keys and values of tokens, (tokens, 3 * hidden)."""
    return np.random.default_rng(0).standard_normal((int(lengths.sum()), 3 * hidden)).astype(np.float32)


def open_model(path: Path, threads: int = 1) -> Any:
    """Open a model with the library."""
    runtime = load_runtime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(SOURCES / LIBRARY))
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("lengths", [[32], [200], [7, 100, 1, 64, 30], [600, 5]], ids=str)
def test_a_session_runs_the_kernel_whole_and_cut_among_threads(
    library: NativeLibrary, chosen_set: str, tmp_path: Path, threads: int, lengths: list[int]
) -> None:
    session = open_model(write_attention_model(tmp_path / "model.onnx", heads=3, hidden=96), threads)
    packed = packed_rows(np.array(lengths), 96)
    (found,) = session.run(None, {"packed": packed, "lengths": np.array(lengths)})
    np.testing.assert_array_equal(found, library.attention(chosen_set, packed, np.array(lengths), 3))
    np.testing.assert_allclose(found, reference.attention(packed, np.array(lengths), 3), rtol=CLOSE, atol=CLOSE)


@pytest.mark.usefixtures("chosen_set")
@pytest.mark.parametrize("threads", [1, 3])
def test_a_session_attends_to_near_tokens(tmp_path: Path, threads: int) -> None:
    session = open_model(write_attention_model(tmp_path / "model.onnx", heads=3, hidden=96, window=9), threads)
    lengths = np.array([30, 1, 200])
    packed, angles = packed_rows(lengths, 96), draw_angles(np.random.default_rng(4), 200, 32)
    given = {"packed": packed, "lengths": lengths, "cosines": angles[0], "sines": angles[1]}
    (found,) = session.run(None, given)
    np.testing.assert_allclose(found, reference.attention(packed, lengths, 3, 9, None, angles), rtol=CLOSE, atol=CLOSE)
    boundless = open_model(write_attention_model(tmp_path / "all.onnx", heads=3, hidden=96, window=2**63 - 1), threads)
    (found,) = boundless.run(None, given)
    wanted = reference.attention(packed, lengths, 3, angles=angles)
    np.testing.assert_allclose(found, wanted, rtol=CLOSE, atol=CLOSE)
    with pytest.raises(Exception, match="there are angles for 0 tokens"):
        session.run(None, given | {"cosines": angles[0][:0], "sines": angles[1][:0]})
    with pytest.raises(Exception, match="window must be 0 or more, not -1"):
        open_model(write_attention_model(tmp_path / "negative.onnx", heads=3, hidden=96, window=-1))


@pytest.mark.usefixtures("chosen_set")
def test_a_session_attends_with_one_query_of_each_pair(tmp_path: Path) -> None:
    session = open_model(write_attention_model(tmp_path / "model.onnx", heads=3, hidden=96, is_first=True), threads=2)
    lengths = np.array([40, 1, 9])
    queries, packed = packed_rows(np.array([3]), 96)[:, :96], packed_rows(lengths, 96)[:, 96:]
    given = {"queries": queries, "packed": packed, "lengths": lengths}
    (found,) = session.run(None, given)
    with pytest.raises(Exception, match="pair 1 has no tokens, so it has no first one"):
        session.run(None, given | {"lengths": np.array([41, 0, 9])})
    wanted = reference.first_attention(queries, packed, lengths, 3)
    np.testing.assert_allclose(found, wanted, rtol=CLOSE, atol=CLOSE)


@pytest.mark.usefixtures("library")
def test_a_session_says_what_is_wrong(tmp_path: Path) -> None:
    session = open_model(write_attention_model(tmp_path / "model.onnx", heads=3, hidden=96))
    packed = packed_rows(np.array([10]), 96)
    for lengths, message in (
        ([4, 7], "pair 1 has a length of 7, and 6 tokens are left"),
        ([4, -1, 7], "pair 1 has a length of -1, and 6 tokens are left"),
        ([4, 5], "the lengths leave 1 of 10 tokens"),
    ):
        with pytest.raises(Exception, match=message):
            session.run(None, {"packed": packed, "lengths": np.array(lengths)})
    with pytest.raises(Exception, match="heads must be 1 to 65536, not 0"):
        open_model(write_attention_model(tmp_path / "no-heads.onnx", heads=0, hidden=96))
    odd = open_model(write_attention_model(tmp_path / "odd.onnx", heads=5, hidden=96))
    with pytest.raises(Exception, match="rows of 288 values are not 3 parts of 5 heads"):
        odd.run(None, {"packed": packed, "lengths": np.array([10])})
