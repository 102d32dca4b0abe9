"""What is known of encoded pairs: where their second text begins, and which tokenizer made them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from cappy_engine.batching import EncodedPairs
from cappy_engine.errors import BundleError
from cappy_engine.tokenizer import PairTokenizer


def test_types_of_special_tokens_that_no_template_tells_are_refused(bundle: Path) -> None:
    """The first </s> has the type of the second text, which begins behind another one."""
    unusual = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    unusual.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s>:0 </s>:1 $A:0 </s>:0 $B:1 </s>:1",
        special_tokens=[(name, unusual.token_to_id(name)) for name in ("<s>", "</s>")],
    )
    with pytest.raises(BundleError, match="joins a pair in an unknown way"):
        PairTokenizer(unusual, max_length=64)


@pytest.mark.parametrize("known", [0, 1])
def test_joined_pairs_are_of_the_tokenizer_that_any_part_tells(known: int, tokenizer: PairTokenizer) -> None:
    parts = [dataclasses.replace(tokenizer.encode([("Is it so?", "Yes")]), tokenizer=None) for _ in range(2)]
    parts[known] = tokenizer.encode([("Is it so?", "Yes")])
    assert EncodedPairs.joined(parts).tokenizer == tokenizer.digest
