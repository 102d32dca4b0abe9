"""Run one training: its steps, what it measures, and the state that it can go on from.

Every process of a distributed training runs the same code; only the main one writes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from cappy_engine import storage
from cappy_engine.batching import Batch, EncodedPairs, model_inputs, plan_batches
from cappy_engine.errors import AdaptError
from cappy_engine.publish import Kind, publish, staging_folder
from cappy_engine.tokenizer import PairTokenizer
from cappy_export.adaptation import state
from cappy_export.adaptation.examples import Examples, grouped_accuracy
from cappy_export.adaptation.launch import make_accelerator
from cappy_export.adaptation.recipe import AdaptOptions, Recipe
from cappy_export.adaptation.schedule import count_steps, plan_steps
from cappy_export.checkpoints.checkpoint import Checkpoint, load_model
from cappy_export.checkpoints.config import read_json
from cappy_export.checkpoints.fast_tokenizer import load_tokenizer
from cappy_export.checkpoints.hub import TOKENIZER_FILES
from cappy_export.checkpoints.refusals import refusing
from cappy_export.options import Say

LOG = "log.jsonl"
ADAPTED = Kind("a checkpoint of 'cappy adapt'", "training.json")


@dataclass(frozen=True)
class Progress:
    """Tell where a training is: `loss` is this step's mean squared error, `held_out` the last evaluation's figures."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    tokens: int
    held_out: dict[str, float] | None


class Run:
    """Hold one training: the model, its optimiser and schedule, the data, and the folder that keeps their state.

    >>> run = Run(checkpoint, training, held_out, Recipe(), Path("my-cappy.training"), print)
    >>> run.start(settings, AdaptOptions())
    >>> run.train(AdaptOptions(), print)
    >>> run.write(Path("my-cappy"), {**settings, "log": run.history()}, force=False)
    """

    def __init__(
        self, checkpoint: Checkpoint, training: Examples, held_out: Examples, recipe: Recipe, folder: Path, say: Say
    ) -> None:
        self.checkpoint, self.training, self.held_out = checkpoint, training, held_out
        self.recipe, self.folder, self.say = recipe, folder, say
        self.accelerator = make_accelerator(recipe.mixed_precision)
        self.encoder, self.pad_token_id = _pair_tokenizer(checkpoint, recipe.max_length)
        with refusing(f"the tokenizer of {checkpoint.name} fails on the examples"):
            self.encoded = self.encoder.encode(training.pairs)
            self.encoded_held_out = self.encoder.encode(held_out.pairs)
        self.steps = count_steps(len(training), batch_size=recipe.batch_size, epochs=recipe.epochs)
        self.steps = min(self.steps, recipe.max_steps or self.steps)
        self.done = 0
        self._held: BinaryIO | None = None

    def start(self, settings: Mapping[str, Any], options: AdaptOptions) -> None:
        """Load the model, and where `options` say so the state of a stopped training."""
        torch.manual_seed(self.recipe.seed)
        model = load_model(self.checkpoint)
        _set_dropout(model, self.recipe.dropout)
        optimizer = torch.optim.AdamW(
            _parameter_groups(model, self.recipe.weight_decay), lr=self.recipe.learning_rate, fused=True
        )
        self.schedule = get_linear_schedule_with_warmup(
            optimizer, round(self.recipe.warmup_fraction * self.steps), self.steps
        )
        self.accelerator.register_for_checkpointing(self.schedule)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self._take_folder(settings, options)
        if options.resume:
            self._resume()
        self.accelerator.wait_for_everyone()
        truncated = int(self.encoded.truncated.sum())
        self.say(
            f"{len(self.training)} examples to train on, {len(self.held_out)} held out; {self.steps} steps on "
            f"{self.accelerator.device.type} x {self.accelerator.num_processes}, mixed precision "
            f"{self.accelerator.mixed_precision}; {truncated} examples truncated to {self.encoder.max_length} tokens"
        )

    def train(self, options: AdaptOptions, progress: Callable[[Progress], object]) -> None:
        """Run the steps that are left, and measure and save as often as `options` say."""
        if not self.done:
            self._log({"step": 0, **self._evaluate(0)})
        held_out, losses, started = None, [], time.monotonic()
        for number, rows in plan_steps(
            self.encoded.lengths,
            self.training.groups,
            batch_size=self.recipe.batch_size,
            seed=self.recipe.seed,
            epochs=self.recipe.epochs,
            done=self.done,
        ):
            if number > self.steps:
                break
            rate = float(self.schedule.get_last_lr()[0])
            losses.append(self._step(rows, number))
            if number % options.evaluate_every == 0 or number == self.steps:
                held_out = self._evaluate(number)
                seconds, mean = time.monotonic() - started, float(np.mean(losses))
                self._log({"step": number, "loss": mean, "learning_rate": rate, **held_out, "seconds": round(seconds)})
                losses, started = [], time.monotonic()
            tokens = int(self.encoded.lengths[rows].sum())
            progress(Progress(number, self.steps, losses[-1] if losses else mean, rate, tokens, held_out))
            if number % options.save_every == 0 and number < self.steps:
                self._save(number)

    def history(self) -> list[dict[str, Any]]:
        """List all evaluations so far."""
        return [json.loads(line) for line in (self.folder / LOG).read_bytes().splitlines()]

    def write(self, out: Path, document: Mapping[str, Any], *, force: bool) -> None:
        """Publish the checkpoint as `out`, complete or not at all; then remove the state."""
        if not self.accelerator.is_main_process:
            return
        model = self.accelerator.unwrap_model(self.model)
        with staging_folder(out, self.say) as staging:
            for name in TOKENIZER_FILES:
                if (self.checkpoint.folder / name).is_file():
                    shutil.copyfile(self.checkpoint.folder / name, staging / name)
            written_by = read_json(self.checkpoint.folder / "config.json").get("transformers_version")
            origin = {} if written_by is None else {"transformers_version": written_by}  # of the tokenizer's files
            storage.write_json(staging / "config.json", {**self.checkpoint.config, **origin, "torch_dtype": "float32"})
            weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
            save_file(weights, staging / "model.safetensors", {"format": "pt"})
            storage.write_json(staging / ADAPTED.marker, document)
            publish(staging, out, ADAPTED, force=force)
        shutil.rmtree(self.folder)

    def close(self) -> None:
        """Let another process have the state."""
        if self._held is not None:
            self._held.close()

    def _step(self, rows: npt.NDArray[np.int64], number: int) -> float:
        """Make one step of the optimiser; return the mean squared error over its rows.

        Each process takes every n-th row, and hands on its gradients with the last of its batches only.
        """
        self.model.train()
        count, size = self.accelerator.num_processes, len(rows)
        mine = rows[self.accelerator.process_index :: count]
        if not len(mine):  # fewer rows than processes: a row that counts for nothing, since all must take part
            mine, weight = rows[:1], 0.0
        else:
            weight = count / size  # processes' gradients are averaged
        batches = plan_batches(self.encoded.lengths[mine], max_batch_tokens=self.recipe.max_batch_tokens)
        total = 0.0
        for place, batch in enumerate(batches):
            picked = mine[batch.rows]
            with _synchronised(self.accelerator, self.model, place == len(batches) - 1):
                scores = self._scores(self.encoded, Batch(picked, batch.length))
                labels = torch.from_numpy(self.training.labels[picked]).to(scores.device)
                loss = (scores - labels).square().sum() * weight
                self.accelerator.backward(loss)
            total += float(loss.detach())
        if not math.isfinite(total):
            raise AdaptError(f"the loss of step {number} is {total}; lower the learning rate, or look at the examples")
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.max_gradient_norm)
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:  # fp16 skips steps whose gradients overflowed
            self.schedule.step()
        self.optimizer.zero_grad()
        mean = self.accelerator.reduce(torch.tensor(total, device=self.accelerator.device), reduction="mean")
        return float(mean)

    def _scores(self, encoded: EncodedPairs, batch: Batch) -> torch.Tensor:
        """Compute `logits[:, 0]` of a batch: (batch,) float32."""
        inputs = model_inputs(encoded, batch, pad_token_id=self.pad_token_id)
        has_types = self.checkpoint.config.get("type_vocab_size", 0) > 1
        taken = ["input_ids", "attention_mask", *(["token_type_ids"] if has_types else [])]
        tensors = {name: torch.from_numpy(inputs[name]).to(self.accelerator.device) for name in taken}
        logits: torch.Tensor = self.model(**tensors).logits
        return logits[:, 0].float()

    def _evaluate(self, number: int) -> dict[str, float]:
        """Measure loss and grouped accuracy on the held-out examples, if any, after step `number`."""
        if not len(self.held_out):
            return {}
        scores = self._predict(self.encoded_held_out)
        accuracy, groups = grouped_accuracy(scores, self.held_out)
        loss = float(np.square(scores - self.held_out.labels).mean())
        if not math.isfinite(loss):
            raise AdaptError(
                f"the held-out loss after step {number} is {loss}; lower the learning rate, or look at the examples"
            )
        return {"held_out_loss": loss} | ({"held_out_accuracy": accuracy} if groups else {})

    def _predict(self, encoded: EncodedPairs) -> npt.NDArray[np.float32]:
        self.model.eval()
        scores = np.empty(len(encoded.lengths), dtype=np.float32)
        with torch.inference_mode():
            for batch in plan_batches(encoded.lengths, max_batch_tokens=self.recipe.max_batch_tokens):
                scores[batch.rows] = self._scores(encoded, batch).cpu().numpy()
        return scores

    def _log(self, entry: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with (self.folder / LOG).open("ab") as file:
                storage.append(file, json.dumps(entry).encode() + b"\n")
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in entry.items() if name != "step")
        self.say(f"step {entry['step']} of {self.steps}: {shown}")

    def _save(self, number: int) -> None:
        """Write the whole state; the one before is removed only when this one is complete."""
        staging = self.folder / "unfinished"
        if self.accelerator.is_main_process:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(staging), safe_serialization=True)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            before = state.states(self.folder)
            shutil.copyfile(self.folder / LOG, staging / LOG)
            storage.sync_tree(staging)
            storage.rename(staging, self.folder / f"{state.STEP}{number}")
            for old in before.values():
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _take_folder(self, settings: Mapping[str, Any], options: AdaptOptions) -> None:
        """Make the folder of the state, or take one that is there; one process holds its lock for all."""
        if options.resume:
            state.check(self.folder, settings)
        if self.accelerator.is_main_process:
            begin = state.go_on if options.resume else functools.partial(state.begin, force=options.force)
            self._held = begin(self.folder, settings)

    def _resume(self) -> None:
        """Load the last state of a stopped training."""
        states = state.states(self.folder)
        if not states:
            (self.folder / LOG).unlink(missing_ok=True)
            self.say("the training was stopped before its first state was saved: it starts again")
            return
        self.done = max(states)
        self.accelerator.load_state(str(states[self.done]))
        if self.accelerator.is_main_process:
            shutil.copyfile(states[self.done] / LOG, self.folder / LOG)
        self.say(f"going on after step {self.done}")


def _pair_tokenizer(checkpoint: Checkpoint, max_length: int) -> tuple[PairTokenizer, int]:
    """Make the engine's tokenizer, so that training sees exactly the tokens that will be served, and its padding id."""
    fast = load_tokenizer(checkpoint, max_length=max_length)
    backend = fast.backend_tokenizer
    with refusing(f"the tokenizer of {checkpoint.name} cannot be used"):
        backend.no_truncation()
        backend.no_padding()
        return PairTokenizer(backend, max_length=fast.model_max_length), int(fast.pad_token_id)


def _parameter_groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices only: neither biases nor normalisation."""
    matrices = [value for value in model.parameters() if value.ndim > 1]
    vectors = [value for value in model.parameters() if value.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _set_dropout(model: PreTrainedModel, dropout: float | None) -> None:
    if dropout is not None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout


def _synchronised(accelerator: Accelerator, model: Any, is_last: bool) -> contextlib.AbstractContextManager[Any]:
    """Hand gradients on between processes only with the last batch of a step."""
    return contextlib.nullcontext() if is_last else accelerator.no_sync(model)
