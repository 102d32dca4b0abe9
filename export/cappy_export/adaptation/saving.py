"""Save the whole state of a training, so that it can go on.

A training that goes on comes to the same weights, in any number of processes. Only the main process writes. All
processes read, so several machines need a common disk to go on.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from cappy_engine import storage
from cappy_engine.errors import AdaptError, CheckpointError, OutputError, reason_of
from cappy_engine.publish import Kind, publish, staging_folder
from cappy_export.adaptation import state
from cappy_export.adaptation.log import LOG, Meter, evaluations, least_loss
from cappy_export.adaptation.stream import Cursor
from cappy_export.checkpoints.checkpoint import Checkpoint, digest_of_files
from cappy_export.checkpoints.config import RAW_SCORES, read_json
from cappy_export.checkpoints.hub import TOKENIZER_FILES
from cappy_export.checkpoints.refusals import full_disk
from cappy_export.checkpoints.weights import check_finite
from cappy_export.options import Say

ADAPTED = Kind("a checkpoint of 'cappy adapt'", "training.json")
WEIGHTS, MOMENTS, PLACE, METER = "model.safetensors", "optimizer.pt", "place.json", "meter.json"


@dataclass(frozen=True)
class Trained:
    """Hold all that a step changes: the model's weights, the optimiser's moments, the schedule, and the meter.

    `force` if the result may replace what is there: an error says how to go on.

    >>> trained = Trained(accelerator, model, optimizer, schedule, Meter(flops_per_token=6e6))
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: AcceleratedOptimizer
    schedule: LRScheduler
    meter: Meter
    force: bool = False

    def weights(self, number: int) -> dict[str, torch.Tensor]:
        """Give the model's weights after step `number`, on the CPU, by name.

        >>> trained.weights(200)["classifier.out_proj.bias"].shape
        torch.Size([1])

        Raises AdaptError for NaN or infinity in them: they would be of no use, and take the place of a good state.
        """
        plain = self.accelerator.unwrap_model(self.model)
        found = {name: value.detach().cpu().contiguous() for name, value in plain.state_dict().items()}
        try:
            check_finite(found)
        except CheckpointError as error:
            raise AdaptError(
                f"after step {number}: {error}; lower the learning rate, or look at the examples"
            ) from error
        return found

    def save(self, folder: Path, number: int, place: Mapping[str, Any], *, keep: int = 0) -> None:
        """Save the state after step `number`; the one before is removed only when this one is complete.

        `place` is the next step's place in the data. The state of step `keep` stays. Raises AdaptError if the disk is
        full, and what `weights` raises.
        """
        if self.accelerator.is_main_process:
            before, weights = state.states(folder), self.weights(number)
            try:
                self._write(folder, number, place, weights)
            except (OSError, RuntimeError, SafetensorError) as error:
                with contextlib.suppress(OSError):
                    shutil.rmtree(folder / state.UNFINISHED)
                kept = f"the state of step {max(before)} is kept" if before else "none was saved before"
                reason = reason_of(full_disk(error) or error)
                raise AdaptError(
                    f"the state of step {number} cannot be saved to {folder} ({reason}); {kept}: make room, and go on "
                    f"with {state.way_on(folder, force=self.force)}"
                ) from error
            for step, old in before.items():
                if step != keep:
                    shutil.rmtree(old)

    @contextlib.contextmanager
    def kept(self, folder: Path, number: int, place: Mapping[str, Any], *, keep: int = 0) -> Iterator[None]:
        """Save the state after step `number` if the block, which writes the result, cannot.

        >>> with trained.kept(Path("my-cappy.training"), 200, cursor.document()):
        ...     write_checkpoint(weights, checkpoint, folder, Path("my-cappy"), {"log": []}, force=False, say=print)

        The arguments are those of `save`. If that fails, too, what was saved before stays.
        """
        try:
            yield
        except (OSError, OutputError, CheckpointError, AdaptError):
            if number not in state.states(folder):
                with contextlib.suppress(OSError, AdaptError):
                    self.save(folder, number, place, keep=keep)
            raise

    def load(self, saved: Path) -> tuple[Cursor, tuple[float, int]]:
        """Take over a saved state; returns the next step's place in the data, and the `least_loss` of its log.

        >>> cursor, best = trained.load(Path("my-cappy.training/step-200"))

        Raises AdaptError if it cannot be read.
        """
        with _of_state(saved):
            with _damaged(saved / WEIGHTS):
                self.accelerator.unwrap_model(self.model).load_state_dict(load_file(saved / WEIGHTS))
            with _damaged(saved / MOMENTS):  # PyTorch's words say to trust it
                moments: dict[str, Any] = torch.load(saved / MOMENTS, map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(moments["optimizer"])
            self.schedule.load_state_dict(moments["schedule"])
            if self.accelerator.scaler is not None and moments["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(moments["scaler"])
            with _damaged(saved / LOG):
                best = least_loss(evaluations(saved))
            with _damaged(saved / METER):
                if (saved / METER).exists():  # older versions saved none
                    self.meter.take(json.loads((saved / METER).read_bytes()))
            with _damaged(saved / PLACE):
                return Cursor.parse(json.loads((saved / PLACE).read_bytes())), best

    def _write(self, folder: Path, number: int, place: Mapping[str, Any], weights: dict[str, torch.Tensor]) -> None:
        staging = folder / state.UNFINISHED
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        save_file(weights, staging / WEIGHTS, {"format": "pt"})
        scaler = self.accelerator.scaler
        moments = {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        _save(moments, staging / MOMENTS)
        storage.write_json(staging / PLACE, place)
        storage.write_json(staging / METER, self.meter.document())
        shutil.copyfile(folder / LOG, staging / LOG)
        storage.sync_tree(staging)
        storage.rename(staging, folder / f"{state.STEP}{number}")


def saved_weights(saved: Path) -> dict[str, torch.Tensor]:
    """Give the weights of a saved state. Raises AdaptError if they cannot be read.

    >>> saved_weights(Path("my-cappy.training/step-200"))["classifier.out_proj.bias"].shape
    torch.Size([1])
    """
    with _of_state(saved), _damaged(saved / WEIGHTS):
        return load_file(saved / WEIGHTS)


@contextlib.contextmanager
def _of_state(saved: Path) -> Iterator[None]:
    """Raise AdaptError where a state cannot be read."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, ValueError, KeyError) as error:
        raise AdaptError(
            f"the saved state {saved} cannot be read ({reason_of(error)}); several machines need a common disk to "
            "go on, and --force starts anew"
        ) from error


def _save(moments: Mapping[str, Any], path: Path) -> None:
    """Write with PyTorch, and raise the system's OSError where the disk is full: PyTorch's own tells of positions."""
    with path.open("wb") as file:
        try:
            torch.save(moments, file)
        except RuntimeError as error:  # raised while it ends the file, after the OSError
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


@contextlib.contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Raise ValueError with the file's name for a missing or damaged file of a state."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path.name} is missing") from error
    except (EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} is damaged") from error


def check_unchanged(checkpoint: Checkpoint, document: Mapping[str, Any], *, way_on: str) -> None:
    """Raise CheckpointError if a checkpoint has other files than its training's `document` says.

    >>> check_unchanged(checkpoint, {"checkpoint": {"sha256": "9015b2f5"}}, way_on="--resume")
    """
    sha256 = document["checkpoint"]["sha256"]
    try:
        problem = "" if digest_of_files(checkpoint.files) == sha256 else "is not as it was when the training began"
    except OSError as error:
        problem = f"cannot be read any more ({reason_of(error)})"
    if problem:
        raise CheckpointError(f"{checkpoint.name} {problem}; put its files back, and go on with {way_on}")


def write_checkpoint(
    weights: dict[str, torch.Tensor],
    checkpoint: Checkpoint,
    folder: Path,
    out: Path,
    document: Mapping[str, Any],
    *,
    force: bool,
    say: Say,
) -> None:
    """Publish trained weights as the checkpoint `out`, complete or not at all.

    The tokenizer of `checkpoint` and the log of `folder` come with them. The config of `out` says that scores are raw,
    whatever the config of `checkpoint` said: the labels were learnt as the raw output.

    >>> write_checkpoint(trained.weights(9), checkpoint, folder, Path("my-cappy"), {"log": []}, force=False, say=print)
    """
    with staging_folder(out, say) as staging:
        for name in TOKENIZER_FILES:
            if (checkpoint.folder / name).is_file():
                shutil.copyfile(checkpoint.folder / name, staging / name)
        written_by = read_json(checkpoint.folder / "config.json").get("transformers_version")
        origin = {} if written_by is None else {"transformers_version": written_by}  # of the tokenizer's files
        config = {**checkpoint.config, **RAW_SCORES, **origin, "torch_dtype": "float32"}
        storage.write_json(staging / "config.json", config)
        with storage.naming(staging / WEIGHTS):
            try:
                save_file(weights, staging / WEIGHTS, {"format": "pt"})
            except SafetensorError as error:
                if full := full_disk(error):
                    raise full from error
                raise
        shutil.copymode(staging / "config.json", staging / WEIGHTS)  # safetensors: for its owner alone
        shutil.copyfile(folder / LOG, staging / LOG)
        storage.write_json(staging / ADAPTED.marker, document)
        publish(staging, out, ADAPTED, force=force)
