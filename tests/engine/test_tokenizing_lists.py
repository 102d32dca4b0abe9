"""A list of any length is tokenised in little memory, and each of its pairs as if it were alone."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from cappy_engine.errors import InvalidPair
from cappy_engine.tokenizer import PairTokenizer

WORDS = ["the", "sky", "is", "blue", "naïve", "狐", "</s>", "\n"]


@pytest.fixture(scope="module")
def file(bundle: Path) -> Path:
    return bundle / "tokenizer.json"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cappy_engine.tokenizer.PART_CHARS", 3000)


def long_list() -> list[tuple[str, str]]:
    """Make pairs whose texts the library gets in some 20 parts; many texts are in pairs of several parts."""
    rng = random.Random(1)
    texts = ["", "Yes", *(" ".join(rng.choices(WORDS, k=rng.choice([1, 20, 250, 300]))) for _ in range(100))]
    return [(rng.choice(texts), rng.choice(texts)) for _ in range(80)]


@pytest.mark.parametrize("max_length", [4, 5, 64, 511, 512])
def test_pairs_of_a_long_list_are_what_they_are_alone(file: Path, max_length: int) -> None:
    pairs, library = long_list(), Tokenizer.from_file(str(file))
    library.no_truncation()
    found = PairTokenizer.from_file(file, max_length=max_length).encode(pairs)
    whole = [len(encoding) for encoding in library.encode_batch_fast(pairs)]
    assert found.truncated.tolist() == [length > max_length for length in whole]
    assert found.lengths.tolist() == [min(length, max_length) for length in whole]
    assert found.without_instruction == tuple(row for row, (first, _) in enumerate(pairs) if not first)
    library.enable_truncation(max_length=max_length, strategy="longest_first")
    most = 30 * max_length  # the library's own cutting takes all combinations of parts
    for row in [row for row, length in enumerate(whole) if length < most]:
        expected = library.encode(*pairs[row])
        assert found.token_ids[row].tolist() == expected.ids
        assert found.type_ids[row].tolist() == expected.type_ids


def test_the_first_pair_that_is_too_long_is_named_with_all_of_its_tokens(file: Path) -> None:
    library = Tokenizer.from_file(str(file))
    whole = [("Is it so?", f"{number} " + "the sky " * 50) for number in range(10, 30)]
    longer = (f"{whole[0][0]} Is it?", whole[0][1])
    most, tokens = (len(library.encode(*pair)) for pair in (whole[0], longer))
    with pytest.raises(InvalidPair, match=rf"has {tokens} tokens, and the model takes {most}; shorten") as caught:
        PairTokenizer.from_file(file, max_length=most).encode([*whole, longer, longer], too_long="refuse")
    assert caught.value.index == len(whole)


@pytest.mark.slow
def test_the_memory_of_long_texts_does_not_grow_with_their_number(file: Path) -> None:
    code = f"""
        import resource
        from pathlib import Path
        from cappy_engine.tokenizer import PairTokenizer

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

        def passages(first, count):
            return [("Is it so?", f"{{number}} " + "the sky is blue " * 1250) for number in range(first, first + count)]

        few, many = passages(0, 100), passages(100, 500)
        tokenizer = PairTokenizer.from_file(Path({str(file)!r}), max_length=512)
        tokenizer.encode(few)
        before = peak()
        assert tokenizer.encode(many).truncated.all()
        print(peak() - before)
    """
    one_thread = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, env=one_thread
    )
    assert int(done.stdout) < 50  # MiB; all at once, 259 were needed
