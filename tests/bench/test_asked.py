"""What a dataclass of options says of its fields is checked by its constructor, as it is on the command line."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from cappy_bench.bulk.bulk_options import BulkBenchOptions
from cappy_bench.candidates.sample_commands import Source, Ways
from cappy_bench.candidates.sample_options import EndpointOptions, LLMOptions, SampleOptions
from cappy_bench.gpu import check
from cappy_bench.load.load_options import LoadOptions
from cappy_bench.quality.evaluate_commands import EvaluateOptions
from cappy_bench.speed import peak
from cappy_bench.speed.run_options import RunOptions
from cappy_engine.errors import SampleError
from cappy_engine.options import questions
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


@pytest.mark.parametrize(
    ("cls", "name"),
    [(cls, name) for cls in ERRORS for name, asked in questions(cls).items() if asked.kind is float],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_no_number_of_a_benchmark_is_infinite(cls: type[Any], name: str) -> None:
    """It is written into the result, and JSON has no such number."""
    with pytest.raises(ERRORS[cls], match=f"{name} must be finite, got inf"):
        cls(**{name: math.inf})


@pytest.mark.parametrize("value", ["inf", "nan", "1e999", "-1", "soon"])
@pytest.mark.parametrize(
    ("main", "words"),
    [(check.main, "--checkpoint c --bundle b --out o --max-seconds"), (peak.main, "--seconds")],
    ids=["gpu.check", "speed.peak"],
)
def test_the_seconds_of_a_program_are_finite(
    main: Callable[[list[str]], object], words: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*words.split(), value])
    assert caught.value.code == 2
    assert f"argument {words.split()[-1]}: " in capsys.readouterr().err
