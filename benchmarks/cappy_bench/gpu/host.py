"""Opens models on a machine with a GPU: `Machine` is the seam that tests fake.

PyTorch is imported only where it is asked for: it brings CUDA's libraries with it, and a check that had loaded it would
not see that ONNX Runtime cannot find them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cappy_bench.peers.peer import Pair
from cappy_engine.bundle import Bundle, open_bundle
from cappy_engine.dispatcher import Dispatcher
from cappy_engine.gpu.installation import Installation, inspect_installation
from cappy_engine.gpu.operator_providers import check_operator_providers
from cappy_engine.gpu.plan import BATCH_TOKENS, GpuModel, plan_gpu
from cappy_engine.gpu.providers import cuda_options
from cappy_engine.gpu.start import find_machine, open_on_gpus
from cappy_engine.options import Device, Precision
from cappy_engine.scorer import Scorer
from cappy_engine.session import Session
from cappy_engine.tokenizer import PairTokenizer

if TYPE_CHECKING:
    from cappy_export.proof.reference import Reference

Environment = Mapping[str, str | None]
"""Variables of a child process beside this process's own; None removes one."""


@dataclass(frozen=True)
class Child:
    """A child process that ended: exit status (None: its time was up) and output."""

    status: int | None
    output: str


@dataclass(frozen=True)
class Machine:
    """All that is done with GPUs, and with PyTorch.

    `inspect()` looks at the installation, `open_scorer(bundle, device, precision)` is `Scorer.open`, and
    `open_session(bundle, device, precision)` opens the session below it. `open_file(model)` opens any model for CUDA,
    without the canary. `open_torch(checkpoint, precision)` is PyTorch in fp16 or bf16 on the GPU,
    `score_reference(checkpoint, pairs, max_length)` in fp32 on the CPU. `run_child(arguments, environment, seconds)`
    runs `cappy_bench.gpu.check` in a process of its own. `trace(run, path)` profiles `run()` into a file of Chrome's
    format.
    """

    inspect: Callable[[], Installation]
    open_scorer: Callable[[Path, str, str], Scorer]
    open_session: Callable[[Path, str, str], tuple[Session, GpuModel]]
    open_file: Callable[[Path], Session]
    open_torch: Callable[[Path, str], Session]
    score_reference: Callable[[Path, Sequence[Pair], int], Reference]
    run_child: Callable[[Sequence[str], Environment, float], Child]
    trace: Callable[[Callable[[], object], Path], object]


class TorchSession:
    """transformers' model on the GPU, as a session: arrays in, scores out when the GPU is done."""

    device = "cuda"

    def __init__(self, module: Any) -> None:
        from cappy_bench.peers.pytorch import runs

        self.run = runs(module)


def this_machine() -> Machine:
    """Return this machine as it is.

    >>> this_machine().inspect().gpus
    ()
    """
    return Machine(
        inspect_installation, _open_scorer, _open_session, _open_file, _open_torch, _score_reference, _run_child, _trace
    )


def scorer_of(session: Session, model: GpuModel) -> Scorer:
    """Make a scorer on a session that is open, with the batches of `model`.

    >>> scorer_of(*machine.open_session(Path("bundle"), "cuda", "fp16")).score([("Is the sky blue?", "Yes")])
    """
    return Scorer(tokenizer_of(model.bundle), Dispatcher(session, model.grouping, pad_token_id=model.pad_token_id))


def tokenizer_of(bundle: Bundle) -> PairTokenizer:
    """Open the bundle's tokenizer.

    >>> tokenizer_of(open_bundle(EMBEDDED)).encode([("Is the sky blue?", "Yes")]).lengths
    array([9])
    """
    return PairTokenizer.from_file(bundle.file("tokenizer.json"), max_length=bundle.manifest.max_length)


def load_torch(checkpoint: Path, precision: str) -> Any:
    """Load the checkpoint's model in fp16 or bf16, with scaled-dot-product attention.

    It may have any format, as for the reference.

    >>> load_torch(Path("checkpoint"), "fp16").dtype
    torch.float16
    """
    import torch

    from cappy_export.checkpoints.checkpoint import load_model, open_checkpoint

    module: Any = load_model(open_checkpoint(checkpoint), attention="sdpa")
    return module.to({"fp16": torch.float16, "bf16": torch.bfloat16}[precision])


def _open_scorer(bundle: Path, device: str, precision: str) -> Scorer:
    return Scorer.open(bundle, device=cast(Device, device), precision=cast(Precision, precision))


def _open_session(bundle: Path, device: str, precision: str) -> tuple[Session, GpuModel]:
    found, machine = open_bundle(bundle), find_machine(device)
    there = machine.installation.gpus
    model = plan_gpu(found, device, precision, gpus=(0,), max_batch_tokens=BATCH_TOKENS, there=there)
    return open_on_gpus(model, machine), model


def _open_file(model: Path) -> Session:
    session = find_machine("cuda").open_model(model, [("CUDAExecutionProvider", cuda_options())])
    check_operator_providers("cuda", session.placed)
    return session


def _open_torch(checkpoint: Path, precision: str) -> Session:
    return TorchSession(load_torch(checkpoint, precision).to("cuda"))


def _score_reference(checkpoint: Path, pairs: Sequence[Pair], max_length: int) -> Reference:
    from cappy_export.checkpoints.checkpoint import open_checkpoint
    from cappy_export.proof.reference import score_with_torch

    return score_with_torch(open_checkpoint(checkpoint), pairs, max_length=max_length)


def _trace(run: Callable[[], object], path: Path) -> None:
    import torch.profiler  # it brings CUDA's libraries with it: not before our session is open

    with torch.profiler.profile(acc_events=True) as profiler:
        run()
    profiler.export_chrome_trace(str(path))


def _run_child(arguments: Sequence[str], environment: Environment, seconds: float) -> Child:
    merged = {**os.environ, **environment}
    command = [sys.executable, "-P", "-m", "cappy_bench.gpu.check", *arguments]
    try:
        done = subprocess.run(  # noqa: S603, the command is ours
            command,
            env={name: value for name, value in merged.items() if value is not None},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return Child(None, (error.stdout or b"").decode(errors="replace"))
    return Child(done.returncode, done.stdout.decode(errors="replace"))
