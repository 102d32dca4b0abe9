"""What a dataclass of options says of its fields is checked by its constructor, as it is on the command line."""

from __future__ import annotations

from typing import Any

import pytest

from cappy_bench.bulk.bulk_options import BulkBenchOptions
from cappy_bench.candidates.sample_commands import Source, Ways
from cappy_bench.candidates.sample_options import EndpointOptions, LLMOptions, SampleOptions
from cappy_bench.load.load_options import LoadOptions
from cappy_bench.quality.evaluate_commands import EvaluateOptions
from cappy_bench.speed.run_options import RunOptions
from cappy_engine.errors import SampleError
from tests.support.asked_fields import wrong_values

ERRORS: dict[type[Any], type[Exception]] = {
    BulkBenchOptions: ValueError,
    EndpointOptions: SampleError,
    EvaluateOptions: ValueError,
    LLMOptions: SampleError,
    LoadOptions: ValueError,
    RunOptions: ValueError,
    SampleOptions: SampleError,
    Source: ValueError,
    Ways: ValueError,
}


@pytest.mark.parametrize(
    ("cls", "name", "value", "shown"),
    [(cls, *wrong) for cls in ERRORS for wrong in wrong_values(cls)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_wrong_value_is_refused_by_its_name(cls: type[Any], name: str, value: Any, shown: Any) -> None:
    with pytest.raises(ERRORS[cls], match=f"{name} .*{shown}"):
        cls(**{name: value})
