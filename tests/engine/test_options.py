"""Options validate themselves and travel as JSON and as pickles; auto takes the documented precision."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cappy_engine import Scorer
from cappy_engine.cli.main import main
from cappy_engine.errors import DeviceUnavailable, PrecisionUnavailable
from cappy_engine.options import ScorerOptions, choose_precision

EVERY = ScorerOptions(
    device="cuda",
    gpus=(1, 0),
    precision="fp16",
    threads=3,
    mode="throughput",
    max_batch_tokens=4096,
    max_text_chars=1000,
)


@pytest.mark.parametrize("options", [ScorerOptions(), EVERY], ids=["defaults", "every option"])
def test_options_come_back_from_json_and_from_a_pickle(options: ScorerOptions) -> None:
    assert ScorerOptions.from_json(options.to_json()) == options
    assert pickle.loads(pickle.dumps(options)) == options
    assert set(json.loads(options.to_json())) == set(vars(options))


@pytest.mark.parametrize("text", ["[]", "null", '"fp32"', '{"batch_size": 8}', '{"threads": 0}', "{", ""])
def test_what_is_not_a_scorers_options_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"scorer options are a JSON object|threads must be|Expecting|property name"):
        ScorerOptions.from_json(text)


@pytest.mark.parametrize("text", [None, 3, {"threads": 2}, ScorerOptions()])
def test_what_is_no_json_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match=f"scorer options are a JSON object in a text, got {type(text).__name__}"):
        ScorerOptions.from_json(text)


def test_a_scorer_takes_its_options_in_one_object(bundle: Path) -> None:
    options = ScorerOptions(device="cpu", precision="int8", threads=1, max_batch_tokens=77)
    with (
        Scorer.open_with(bundle, options) as opened,
        Scorer.open(bundle, device="cpu", precision="int8", threads=1, max_batch_tokens=77) as same,
    ):
        assert opened.info == same.info


def test_the_exact_model_has_the_same_settings(bundle: Path) -> None:
    with Scorer.open(
        bundle, device="cpu", precision="int8", threads=2, mode="throughput", max_batch_tokens=77
    ) as opened:
        exact = opened.info.exact()
    assert exact == ScorerOptions(device="cpu", precision="fp32", threads=2, mode="throughput", max_batch_tokens=77)


@pytest.mark.parametrize(
    ("device", "available", "chosen"),
    [
        ("cpu", ("fp32", "fp16", "int8"), "fp32"),
        ("cpu", ("fp16", "int8"), "int8"),
        ("cpu", ("fp16",), "fp16"),
        ("cuda", ("fp32", "fp16", "int8"), "fp32"),
        ("cuda", ("fp16", "int8"), "fp16"),
        ("tensorrt", ("int8", "fp16", "fp32"), "fp32"),
        ("tensorrt", ("int8", "fp16"), "fp16"),
        ("tensorrt", ("int8",), "int8"),
    ],
)
def test_auto_precision_is_the_first_of_the_documented_order(
    device: str, available: Sequence[str], chosen: str
) -> None:
    precision, reason = choose_precision("auto", device, available)
    assert precision == chosen
    assert reason.startswith("auto: ")
    assert choose_precision("fp32", device, available) == ("fp32", "asked for")


def test_int8_is_refused_where_it_would_run_on_the_cpu_unseen() -> None:
    for asked in ("int8", "auto"):
        with pytest.raises(DeviceUnavailable, match="int8 does not run on cuda, which runs fp32, fp16"):
            choose_precision(asked, "cuda", ("int8",))


def test_bf16_runs_on_cpus_and_by_its_name_only() -> None:
    assert choose_precision("bf16", "cpu", ("bf16",)) == ("bf16", "asked for")
    assert choose_precision("auto", "cpu", ("bf16", "int8"))[0] == "int8"
    with pytest.raises(PrecisionUnavailable, match="only bf16 for cpu, which auto does not choose; ask for bf16"):
        choose_precision("auto", "cpu", ("bf16",))
    with pytest.raises(DeviceUnavailable, match="bf16 does not run on cuda, which runs fp32, fp16"):
        choose_precision("bf16", "cuda", ("fp32",))


@pytest.mark.parametrize("device", ["cpu", "cuda", "tensorrt"])
def test_a_bundle_without_a_model_for_the_device_tells_how_to_get_one(device: str) -> None:
    problem = f"the bundle has no model for {device}; export it with --target {device}"
    with pytest.raises(PrecisionUnavailable, match=problem):
        choose_precision("auto", device, ())


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"gpus": [1]}, r"gpus \[1\] need a device that has some: cuda or tensorrt, not 'auto'"),
        ({"device": "cpu", "gpus": [0]}, r"gpus \[0\] need a device that has some"),
        ({"device": "gpu"}, "unknown device 'gpu'; choose from auto, cpu, cuda"),
        ({"precision": "tf32"}, "unknown precision 'tf32'; choose from auto, fp32, fp16, bf16, int8"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"max_batch_tokens": 0}, "max_batch_tokens must be at least 1, got 0"),
        ({"max_text_chars": 0}, "max_text_chars must be at least 1, got 0"),
        ({"device": None}, "unknown device None; choose from auto, cpu, cuda"),
        ({"precision": ["fp32"]}, r"unknown precision \['fp32'\]; choose from auto, fp32"),
        ({"threads": True}, "threads must be a whole number of at least 1, got bool True"),
        ({"threads": 2.5}, "threads must be a whole number of at least 1, got float 2.5"),
        ({"threads": "2"}, "threads must be a whole number of at least 1, got str '2'"),
        ({"device": "cuda", "gpus": 0}, "gpus must be a list of numbers, got int 0"),
        ({"device": "cuda", "gpus": "01"}, "gpus must be a list of numbers, got str '01'"),
        ({"device": "cuda", "gpus": []}, "gpus must name at least one GPU"),
        ({"device": "cuda", "gpus": [True]}, "a number in gpus must be a whole number of at least 0, got bool True"),
        ({"device": "cuda", "gpus": ["0"]}, "a number in gpus must be a whole number of at least 0, got str '0'"),
    ],
)
def test_an_option_out_of_range_is_a_wrong_argument(bundle: Path, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Scorer.open(bundle, **options)


@pytest.mark.parametrize("text", ['{"threads": NaN}', '{"mode": 3}', "[" * 100_000])
def test_options_from_json_are_checked_as_others_are(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be a|unknown mode 3|nested too deeply"):
        ScorerOptions.from_json(text)


def test_numpys_whole_numbers_become_pythons() -> None:
    threads: Any = np.int32(2)
    gpus: Any = np.array([1, 0])
    options = ScorerOptions(device="cuda", threads=threads, gpus=gpus)
    assert ScorerOptions.from_json(options.to_json()) == options == ScorerOptions(device="cuda", threads=2, gpus=(1, 0))


def test_an_unknown_option_is_an_error(bundle: Path) -> None:
    options: dict[str, Any] = {"batch_size": 8}
    with pytest.raises(TypeError, match="batch_size"):
        Scorer.open(bundle, **options)


@pytest.mark.parametrize("threads", [5000, 10**14])
def test_threads_beyond_all_cores_are_a_mistake(threads: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=f"threads must be at most 4096, got {threads}"):
        ScorerOptions(threads=threads)
    assert main(["rank", "--instruction", "q", "--candidate", "a", "--threads", str(threads)]) == 2
    assert f"threads must be at most 4096, got {threads}" in capsys.readouterr().err
