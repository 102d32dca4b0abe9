"""A stream of shards: each example once per epoch, in whole steps, the same from any step on, of files of any kind."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cappy_engine.batching import EncodedPairs
from cappy_engine.bulk.formats.entries import Position
from cappy_engine.bulk.formats.tables import pack_zstd
from cappy_engine.errors import AdaptError, CappyError
from cappy_engine.pairs import Pair
from cappy_export.adaptation.examples import make_examples
from cappy_export.adaptation.log import Progress
from cappy_export.adaptation.scanning import Counted, count
from cappy_export.adaptation.shards import FileShard, HeldShard, Shard, find_shards, read_all
from cappy_export.adaptation.stream import Cursor, Step, Stream, encode_all
from cappy_export.adaptation.training import adapt
from tests.support.colours import RECIPE, colour_examples, write_examples

sizes = st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(lambda found: sum(found) > 0)


def encode(pairs: list[Pair]) -> EncodedPairs:
    """Make the row's number the one token that tells it, and as many others as its label's digits say."""
    ids = [np.array([int(response), *[7] * (int(response) % 5)]) for _, response in pairs]
    lengths = np.array([len(each) for each in ids])
    return EncodedPairs(ids, [np.zeros_like(each) for each in ids], lengths, lengths > 4)


def rows_from(first: int, count: int) -> list[tuple[Pair, float]]:
    return [((f"question {row // 3}", str(row)), (row % 4) / 4) for row in range(first, first + count)]


def held(counts: list[int]) -> list[Shard]:
    starts = np.cumsum([0, *counts])
    parts = [rows_from(int(start), count) for start, count in zip(starts, counts, strict=False)]
    return [HeldShard(make_examples([pair for pair, _ in part], [label for _, label in part])) for part in parts]


def stream_of(shards: list[Shard], *, window: int = 16, batch_size: int = 4, seed: int = 0) -> Stream:
    examples = sum(1 for _ in read_all(shards))
    return Stream(shards, encode, examples, -(2**64), window=window, batch_size=batch_size, seed=seed)


def told(step: Step) -> list[int]:
    """List the numbers of a step's examples."""
    ends = np.cumsum(step.window.lengths)
    return [int(step.window.tokens[ends[row] - step.window.lengths[row]]) for row in step.rows]


def all_steps(stream: Stream, epochs: int = 2) -> list[Step]:
    return list(stream.steps(stream.windows(Cursor(), epochs), done=0))


@pytest.mark.slow
@settings(deadline=None)
@given(counts=sizes, window=st.integers(1, 40), batch_size=st.integers(1, 6), seed=st.integers(0, 99))
def test_each_epoch_has_each_example_once_in_steps_that_are_full_but_perhaps_one(
    counts: list[int], window: int, batch_size: int, seed: int
) -> None:
    stream = stream_of(held(counts), window=window, batch_size=batch_size, seed=seed)
    steps = all_steps(stream)
    assert [step.number for step in steps] == list(range(1, len(steps) + 1))
    of_epoch = len(steps) // 2
    for epoch in (steps[:of_epoch], steps[of_epoch:]):
        assert sorted(row for step in epoch for row in told(step)) == list(range(sum(counts)))
        assert sum(len(step.rows) != batch_size for step in epoch) <= 1


@pytest.mark.slow
@settings(deadline=None)
@given(counts=sizes, window=st.integers(1, 40), batch_size=st.integers(1, 6), share=st.floats(0, 1))
def test_going_on_where_a_step_says_gives_exactly_the_steps_left(
    counts: list[int], window: int, batch_size: int, share: float
) -> None:
    stream = stream_of(held(counts), window=window, batch_size=batch_size)
    steps = all_steps(stream)
    last = steps[int(share * (len(steps) - 1))]
    cursor = Cursor.parse(json.loads(json.dumps(last.next.document())))
    left = stream.steps(stream.windows(cursor, 2), done=last.number)
    assert [(step.number, told(step)) for step in left] == [(step.number, told(step)) for step in steps[last.number :]]


def test_epochs_take_the_shards_in_another_order_and_seeds_too() -> None:
    shards = held([4] * 30)
    orders = [[told(step)[0] // 4 for step in all_steps(stream_of(shards, window=4, seed=seed))] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:30] != orders[0][30:]
    assert sorted(orders[0][:30]) == list(range(30))


def test_inputs_are_the_rows_tokens_padded() -> None:
    examples = make_examples([pair for pair, _ in rows_from(0, 9)], [1.0] * 9)
    window = encode_all(examples, encode, has_types=True)
    inputs = window.inputs(np.array([8, 2]), 5, pad_token_id=1)
    assert inputs["input_ids"].tolist() == [[8, 7, 7, 7, 1], [2, 7, 7, 1, 1]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert inputs["token_type_ids"].tolist() == [[0] * 5] * 2


# Files


def write_shards(folder: Path) -> list[tuple[Pair, float]]:
    """Write shards of every kind, ten rows each; returns the rows in the order of the files' names."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir()
    parts = [rows_from(10 * number, 10) for number in range(5)]
    fields = [[{"instruction": a, "response": b, "label": label} for (a, b), label in part] for part in parts]
    lines = ["".join(json.dumps(row) + "\n" for row in part).encode() for part in fields]
    (folder / "0.jsonl").write_bytes(lines[0])
    (folder / "1.jsonl.gz").write_bytes(gzip.compress(lines[1]))
    (folder / "2.jsonl.zst").write_bytes(pack_zstd(lines[2]))
    pq.write_table(pa.Table.from_pylist(fields[3]), folder / "3.parquet", row_group_size=3)
    csv = [
        "instruction,response,label",
        *(f"{row['instruction']},{row['response']},{row['label']}" for row in fields[4]),
    ]
    (folder / "4.csv").write_text("\n".join(csv))
    (folder / "README.md").write_text("not a shard")
    return [row for part in parts for row in part]


def test_a_folder_and_a_pattern_give_the_rows_of_files_of_every_kind(tmp_path: Path) -> None:
    expected = write_shards(tmp_path / "rows")
    for source in (tmp_path / "rows", str(tmp_path / "rows" / "[0-9].*")):
        found = [(each.pair, each.label) for each in read_all(find_shards(source))]
        assert found == expected


def test_no_file_of_a_folder_is_left_out_and_none_comes_twice(tmp_path: Path) -> None:
    """A link to a folder of shards is one way to share them; with `**` a pattern fits a folder and what is in it."""
    expected = write_shards(tmp_path / "elsewhere")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "linked").symlink_to(tmp_path / "elsewhere")
    for source in (tmp_path / "rows", str(tmp_path / "rows" / "**" / "[l0-9]*")):
        assert [(each.pair, each.label) for each in read_all(find_shards(source))] == expected
    (tmp_path / "rows" / "gone.jsonl").symlink_to(tmp_path / "nothing.jsonl")
    with pytest.raises(AdaptError, match=r"cannot be read: .*gone\.jsonl cannot be read: No such file"):
        find_shards(tmp_path / "rows")


def test_hidden_files_of_a_folder_are_left_out_and_told(tmp_path: Path) -> None:
    expected = write_shards(tmp_path / "rows")
    write_shards(tmp_path / "rows" / ".ipynb_checkpoints")
    said: list[str] = []
    found = find_shards(tmp_path / "rows", say=said.append)
    assert [(each.pair, each.label) for each in read_all(found)] == expected
    hidden, others = said
    assert hidden.startswith(
        f"note: hidden files of rows are not read: {tmp_path}/rows/.ipynb_checkpoints/0.jsonl and "
    )
    assert others == f"note: files whose names do not tell rows are not read: {tmp_path}/rows/README.md"


def test_a_file_of_every_kind_is_read_from_any_row_on(tmp_path: Path) -> None:
    write_shards(tmp_path / "rows")
    for shard in find_shards(tmp_path / "rows"):
        rows = [(each.pair, each.position()) for each in shard.read(Position())]
        for place, (_, position) in enumerate(rows):
            assert position is not None
            left = [each.pair for each in shard.read(position)]
            assert left == [pair for pair, _ in rows[place + 1 :]], shard.name


def test_what_names_no_file_is_refused(tmp_path: Path) -> None:
    for source, problem in [
        (tmp_path, "holds no file of rows"),
        (tmp_path / "*.jsonl", "no file fits the pattern"),
    ]:
        with pytest.raises(AdaptError, match=problem):
            find_shards(source)


def test_a_pipe_is_refused_as_it_cannot_be_read_again(checkpoint: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b'{"instruction": "a", "response": "b", "label": 1}\n')
    os.close(writer)
    with os.fdopen(reader), pytest.raises(AdaptError, match=r"is a pipe .* TRAIN is read several times; save it to a"):
        adapt(checkpoint, f"/dev/fd/{reader}", tmp_path / "out")


def test_a_table_without_labels_or_with_a_bad_one_is_named(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    good = {"instruction": "a", "response": "b"}
    pq.write_table(pa.Table.from_pylist([good]), tmp_path / "none.parquet")
    pq.write_table(pa.Table.from_pylist([{**good, "label": 1.0}, {**good, "label": 2.0}]), tmp_path / "bad.parquet")
    (tmp_path / "bad.csv").write_text("instruction,response,label\na,b,yes\n")
    (tmp_path / "empty.csv").write_text("instruction,response,label\na,b,\n")
    (tmp_path / "python.csv").write_text("instruction,response,label\na,b, 0.5\na,b,0_1\n")
    (tmp_path / "digits.csv").write_text("instruction,response,label\na,b,\u0661\n", encoding="utf-8")
    for name, problem in [
        ("none.parquet", r"none\.parquet has no column 'label'"),
        ("bad.parquet", r"bad\.parquet, row 2: has the label 2\.0; labels go from"),
        ("empty.csv", r"empty\.csv, line 2: has the label '', which is not a number"),
        ("bad.csv", r"bad\.csv, line 2: has the label 'yes', which is not a number"),
        ("python.csv", r"python\.csv, line 3: has the label '0_1', which is not a number"),
        ("digits.csv", r"digits\.csv, line 2: has the label '\u0661', which is not a number"),
    ]:
        with pytest.raises(AdaptError, match=problem):
            list(FileShard(tmp_path / name).read(Position()))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path / "rows")
    whole = (tmp_path / "rows" / "1.jsonl.gz").read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-12])
    with pytest.raises(CappyError, match=r"cut\.jsonl\.gz is not a complete gzip file"):
        list(FileShard(tmp_path / "cut.jsonl.gz").read(Position()))


def test_a_file_that_was_rewritten_with_as_many_rows_stops_the_training(checkpoint: Path, tmp_path: Path) -> None:
    examples, recipe = colour_examples(20), dataclasses.replace(RECIPE, epochs=20)
    path = write_examples(tmp_path / "train.jsonl", examples)

    def rewrite(progress: Progress) -> None:
        if progress.step == 1:
            write_examples(path, make_examples(examples.pairs, 1 - examples.labels))

    with pytest.raises(
        AdaptError, match=r"changed while they were read: train\.jsonl does not hold what it did; start"
    ):
        adapt(checkpoint, path, tmp_path / "out", recipe, progress=rewrite)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [1, -1])
def test_a_file_that_changed_since_it_was_counted_stops_the_training(tmp_path: Path, change: int) -> None:
    write_shards(tmp_path / "rows")
    stream, path = stream_of(find_shards(tmp_path / "rows")), tmp_path / "rows" / "0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, lines[0]] if change > 0 else lines[:-1]))
    problem = f"the examples have changed while they were read: there are {50 + change}, and were 50"
    with pytest.raises(AdaptError, match=problem):
        all_steps(stream)


@pytest.mark.parametrize("changed", range(3))
def test_each_shard_must_hold_what_it_did_when_it_was_counted(changed: int) -> None:
    shards, found = held([4] * 3), Counted()
    for _ in count(shards, range(3), seed=0, found=found):
        pass
    digests = [digest for _, digest in found.shards.values()]
    assert len(all_steps(dataclasses.replace(stream_of(shards), digests=digests), epochs=1)) == 3
    pairs = [pair for pair, _ in rows_from(4 * changed, 4)]
    shards[changed] = HeldShard(make_examples(pairs, [1.0] * 4))
    with pytest.raises(AdaptError, match="the examples does not hold what it did"):
        all_steps(dataclasses.replace(stream_of(shards), digests=digests), epochs=1)
