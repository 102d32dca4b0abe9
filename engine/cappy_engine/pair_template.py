"""Join the token ids of two texts into those of a pair: special tokens, token types, truncation `longest_first`.

Where the special tokens go is learnt from the tokenizer itself, and checked. The joining is ours because the tokenizers
library's (`Tokenizer.post_process` with truncation) builds every combination of overflowing parts: 3 s for one pair of
100,000 characters each, and all the memory there is for a million.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cappy_engine.batching import Ids
from cappy_engine.errors import BundleError

HARMLESS = "a"
"""A text that every tokenizer encodes: it was encoded when the tokenizer was opened."""
TextIds = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class PairTemplate:
    """The special tokens around a pair: `prefix A middle B suffix`, and the token type ids of these five parts."""

    prefix: Ids
    middle: Ids
    suffix: Ids
    type_ids: tuple[int, ...]

    @property
    def special_tokens(self) -> int:
        """Count the special tokens of a pair."""
        return len(self.prefix) + len(self.middle) + len(self.suffix)

    def join(self, first: TextIds, second: TextIds) -> Ids:
        """Join two texts' token ids into the pair's, (length,) int64."""
        return np.concatenate([self.prefix, first, self.middle, second, self.suffix])

    def join_types(self, first: int, second: int) -> Ids:
        """Make a pair's token type ids, (length,) int64: its texts have `first` and `second` tokens.

        The array is read-only, since pairs share it.
        """
        lengths = (len(self.prefix), first, len(self.middle), second, len(self.suffix))
        types = np.repeat(np.array(self.type_ids, dtype=np.int64), lengths)
        types.setflags(write=False)
        return types


def truncate_longest_first(first: int, second: int, budget: int) -> tuple[int, int]:
    """Count the tokens to keep of a pair's two texts, as the tokenizers library does.

    The longer text loses first. Where both must be cut and the budget is odd, the text that was longer keeps one more
    (the second, if they were equal).

        >>> truncate_longest_first(10, 3, 9)
        (6, 3)
    """
    if first + second <= budget:
        return first, second
    shorter = min(first, second, budget // 2)
    longer = budget - shorter
    return (longer, shorter) if first > second else (shorter, longer)


def find_template(encode: Callable[..., Any]) -> PairTemplate:
    """Learn from a tokenizer's `encode` which special tokens it puts around a pair.

    Raises BundleError if its output for a probe cannot be explained by a template, and what `encode` raises.
    """
    first, second = (encode(text, add_special_tokens=False) for text in (HARMLESS, "b"))
    joined = encode(HARMLESS, "b")
    template = _split(joined, first.ids, second.ids)
    probe = ("an example, rather longer", "its\nanswer")
    parts = [np.array(encode(text, add_special_tokens=False).ids, dtype=np.uint32) for text in probe]
    expected = encode(*probe)
    if (
        template is None
        or template.join(parts[0], parts[1]).tolist() != expected.ids
        or template.join_types(len(parts[0]), len(parts[1])).tolist() != expected.type_ids
    ):
        raise BundleError(f"this tokenizer joins a pair in an unknown way: ('a', 'b') becomes {joined.tokens}")
    return template


def _split(joined: Any, first: list[int], second: list[int]) -> PairTemplate | None:
    """Cut the ids of a joined pair into prefix, first, middle, second, suffix; None if they are not found in it."""
    ids, types = joined.ids, joined.type_ids
    starts = [at for at in range(len(ids)) if ids[at : at + len(first)] == first]
    for start in starts:
        after = start + len(first)
        for at in range(after, len(ids)):
            if ids[at : at + len(second)] == second:
                end = at + len(second)
                cuts = (ids[:start], ids[after:at], ids[end:])
                prefix, middle, suffix = (np.array(cut, dtype=np.int64) for cut in cuts)
                sections = (types[:start], types[start:after], types[after:at], types[at:end], types[end:])
                return PairTemplate(prefix, middle, suffix, tuple(types[0] if types else 0 for types in sections))
    return None
