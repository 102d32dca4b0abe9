"""Adaptation: fine-tune a checkpoint on pairs with labels, by Cappy's recipe (arXiv 2311.06720), no LLM needed.

Mean squared error of `logits[:, 0]` with AdamW, under a linear schedule with warm-up. The same options and files give
the same steps, so a training that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator, PartialState
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from cappy_engine import batching
from cappy_engine.batching import EncodedPairs
from cappy_engine.errors import AdaptError
from cappy_engine.tokenizer import PairTokenizer
from cappy_export.adaptation.examples import Examples, grouped_accuracy, hold_out, read_examples
from cappy_export.adaptation.recipe import Recipe, choose_mixed_precision
from cappy_export.adaptation.schedule import count_steps, plan_steps
from cappy_export.checkpoints.checkpoint import (
    Checkpoint,
    digest_of_files,
    load_model,
    load_tokenizer,
    open_checkpoint,
)
from cappy_export.checkpoints.hub import TOKENIZER_FILES
from cappy_export.publish import publish, staging_folder

LOG, SETTINGS, STATE = "log.jsonl", "settings.json", "step-"

log = logging.getLogger(__name__)
Say = Callable[[str], object]


@dataclass(frozen=True)
class Progress:
    """Where a training is: `loss` is the mean squared error of this step, `held_out` what the last evaluation gave."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    tokens: int
    held_out: dict[str, float] | None


def adapt(
    checkpoint: str | Path,
    train: str | Path | Examples,
    out: str | Path,
    *,
    held_out: str | Path | Examples | None = None,
    held_out_fraction: float = 0.02,
    recipe: Recipe | None = None,
    evaluate_every: int = 200,
    save_every: int = 200,
    resume: bool = False,
    revision: str | None = None,
    say: Say = log.info,
    progress: Callable[[Progress], object] = lambda progress: None,
) -> dict[str, Any]:
    """Fine-tune `checkpoint` (a folder or hub id) on the examples `train`; write the result to the folder `out`.

    `train` is JSON Lines with instruction, response and label (0 to 1). Every `evaluate_every` steps, and at both ends,
    loss and grouped accuracy are measured on `held_out`, or on all examples of `held_out_fraction` of the instructions,
    which are then not trained on. Every `save_every` steps the whole state is written to `OUT.training`; with `resume`
    a training that was stopped goes on from there, to the same weights. Returns what `OUT/training.json` says.

    Raises AdaptError, CheckpointError, ExportError if `out` exists, and ValueError for options out of range.
    """
    recipe = recipe or Recipe()
    _check_every(evaluate_every=evaluate_every, save_every=save_every)
    if not 0 <= held_out_fraction < 1:
        raise ValueError(f"held_out_fraction must be 0 or more and less than 1, got {held_out_fraction}")
    target = Path(out)
    if os.path.lexists(target):
        raise AdaptError(f"{target} exists; choose another name, or remove it")
    opened = open_checkpoint(checkpoint, revision=revision)
    training, kept = _split(train, held_out, held_out_fraction, recipe.seed)
    settings = _settings(opened, training, kept, recipe)
    run = _Run(opened, training, kept, recipe, target.with_name(target.name + ".training"), say)
    run.start(settings, resume=resume)
    run.train(evaluate_every, save_every, progress)
    document = {**settings, "log": run.history()}
    run.write(target, document)
    return document


class _Run:
    """One training: the model, its optimiser and schedule, the data, and the folder that holds their state."""

    def __init__(
        self, checkpoint: Checkpoint, training: Examples, held_out: Examples, recipe: Recipe, folder: Path, say: Say
    ) -> None:
        self.checkpoint, self.training, self.held_out = checkpoint, training, held_out
        self.recipe, self.folder, self.say = recipe, folder, say
        self.accelerator = _accelerator(recipe.mixed_precision)
        self.encoder = _pair_tokenizer(checkpoint, recipe.max_length)
        self.encoded = self.encoder.encode(training.pairs)
        self.encoded_held_out = self.encoder.encode(held_out.pairs)
        self.steps = count_steps(len(training), batch_size=recipe.batch_size, epochs=recipe.epochs)
        self.steps = min(self.steps, recipe.max_steps or self.steps)
        self.done = 0

    def start(self, settings: dict[str, Any], *, resume: bool) -> None:
        """Load the model, and the state of a stopped training if there is one to resume."""
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
        if resume:
            self._resume(settings)
        elif self.folder.exists():
            raise AdaptError(f"{self.folder} holds a training that was stopped; go on with --resume, or remove it")
        elif self.accelerator.is_main_process:
            self.folder.mkdir(parents=True)
            _write_json(self.folder / SETTINGS, settings)
        self.accelerator.wait_for_everyone()
        truncated = int(self.encoded.truncated.sum())
        self.say(
            f"{len(self.training)} examples to train on, {len(self.held_out)} held out; {self.steps} steps on "
            f"{self.accelerator.device.type} x {self.accelerator.num_processes}, mixed precision "
            f"{self.accelerator.mixed_precision}; {truncated} examples truncated to {self.encoder.max_length} tokens"
        )

    def train(self, evaluate_every: int, save_every: int, progress: Callable[[Progress], object]) -> None:
        """Run the steps that are left."""
        if not self.done:
            self._log({"step": 0, **self._evaluate()})
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
            if number % evaluate_every == 0 or number == self.steps:
                held_out = self._evaluate()
                seconds, mean = time.monotonic() - started, float(np.mean(losses))
                self._log({"step": number, "loss": mean, "learning_rate": rate, **held_out, "seconds": round(seconds)})
                losses, started = [], time.monotonic()
            tokens = int(self.encoded.lengths[rows].sum())
            progress(Progress(number, self.steps, losses[-1] if losses else mean, rate, tokens, held_out))
            if number % save_every == 0 and number < self.steps:
                self._save(number)

    def history(self) -> list[dict[str, Any]]:
        """All evaluations so far."""
        return [json.loads(line) for line in (self.folder / LOG).read_text(encoding="utf-8").splitlines()]

    def write(self, target: Path, document: dict[str, Any]) -> None:
        """Publish the checkpoint under its name, complete or not at all; then remove the state."""
        if not self.accelerator.is_main_process:
            return
        model = self.accelerator.unwrap_model(self.model)
        with staging_folder(target, self.say) as staging:
            for name in TOKENIZER_FILES:
                if (self.checkpoint.folder / name).exists():
                    shutil.copyfile(self.checkpoint.folder / name, staging / name)
            config = {**self.checkpoint.config, "torch_dtype": "float32"}
            _write_json(staging / "config.json", config)
            weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
            save_file(weights, staging / "model.safetensors", {"format": "pt"})
            _write_json(staging / "training.json", document)
            publish(staging, target, force=False)
        shutil.rmtree(self.folder)

    def _step(self, rows: npt.NDArray[np.int64], number: int) -> float:
        """One step of the optimiser; returns the mean squared error over its rows.

        Each process takes every n-th row; it hands on its gradients with the last of its batches only.
        """
        self.model.train()
        count, size = self.accelerator.num_processes, len(rows)
        mine = rows[self.accelerator.process_index :: count]
        if not len(mine):  # fewer rows than processes: a row that counts for nothing, since all must take part
            mine, weight = rows[:1], 0.0
        else:
            weight = count / size  # processes' gradients are averaged
        batches = batching.plan_batches(self.encoded.lengths[mine], max_batch_tokens=self.recipe.max_batch_tokens)
        total = 0.0
        for place, batch in enumerate(batches):
            picked = mine[batch.rows]
            with _synchronised(self.accelerator, self.model, place == len(batches) - 1):
                scores = self._scores(self.encoded, batching.Batch(picked, batch.length))
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

    def _scores(self, encoded: EncodedPairs, batch: batching.Batch) -> torch.Tensor:
        """`logits[:, 0]` of a batch: (batch,) float32."""
        inputs = {
            "input_ids": batching.pad(encoded.token_ids, batch, value=self._pad_token_id),
            "attention_mask": batching.attention_mask(encoded.lengths, batch),
        }
        if self.checkpoint.config.get("type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = batching.pad(encoded.type_ids, batch, value=0)
        tensors = {name: torch.from_numpy(value).to(self.accelerator.device) for name, value in inputs.items()}
        logits: torch.Tensor = self.model(**tensors).logits
        return logits[:, 0].float()

    @property
    def _pad_token_id(self) -> int:
        return int(self.accelerator.unwrap_model(self.model).config.pad_token_id)

    def _evaluate(self) -> dict[str, float]:
        """Loss and grouped accuracy on the held-out examples; nothing if there are none."""
        if not len(self.held_out):
            return {}
        scores = self._predict(self.encoded_held_out)
        accuracy, groups = grouped_accuracy(scores, self.held_out)
        found = {"held_out_loss": float(np.square(scores - self.held_out.labels).mean())}
        return found | ({"held_out_accuracy": accuracy} if groups else {})

    def _predict(self, encoded: EncodedPairs) -> npt.NDArray[np.float32]:
        self.model.eval()
        scores = np.empty(len(encoded.lengths), dtype=np.float32)
        with torch.inference_mode():
            for batch in batching.plan_batches(encoded.lengths, max_batch_tokens=self.recipe.max_batch_tokens):
                scores[batch.rows] = self._scores(encoded, batch).cpu().numpy()
        return scores

    def _log(self, entry: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
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
            before = _states(self.folder)
            shutil.copyfile(self.folder / LOG, staging / LOG)
            staging.rename(self.folder / f"{STATE}{number}")
            for old in before.values():
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _resume(self, settings: dict[str, Any]) -> None:
        if not (self.folder / SETTINGS).is_file():
            raise AdaptError(f"there is nothing to resume: {self.folder} does not exist; leave out --resume")
        before = json.loads((self.folder / SETTINGS).read_text(encoding="utf-8"))
        old, new = _flat(before), _flat(settings)
        changed = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        if changed:
            shown = "; ".join(f"{name} was {old.get(name)}, is {new.get(name)}" for name in changed)
            raise AdaptError(f"{self.folder} belongs to another training ({shown}); it can only go on as it began")
        states = _states(self.folder)
        if not states:
            (self.folder / LOG).unlink(missing_ok=True)
            self.say("the training was stopped before its first state was saved: it starts again")
            return
        self.done = max(states)
        self.accelerator.load_state(str(states[self.done]))
        if self.accelerator.is_main_process:
            shutil.copyfile(states[self.done] / LOG, self.folder / LOG)
        self.say(f"going on after step {self.done}")


def _check_every(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _accelerator(asked: str) -> Accelerator:
    device = PartialState().device.type
    has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return Accelerator(mixed_precision=choose_mixed_precision(asked, device=device, has_bf16=has_bf16))


def _pair_tokenizer(checkpoint: Checkpoint, max_length: int) -> PairTokenizer:
    """The engine's tokenizer, so that training sees exactly the tokens that will be served."""
    fast = load_tokenizer(checkpoint, max_length=max_length)
    backend = fast.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return PairTokenizer(backend, max_length=fast.model_max_length)


def _split(
    train: str | Path | Examples, held_out: str | Path | Examples | None, fraction: float, seed: int
) -> tuple[Examples, Examples]:
    examples = train if isinstance(train, Examples) else read_examples(train)
    if held_out is None:
        return hold_out(examples, fraction, seed=seed)
    return examples, held_out if isinstance(held_out, Examples) else read_examples(held_out)


def _settings(checkpoint: Checkpoint, training: Examples, held_out: Examples, recipe: Recipe) -> dict[str, Any]:
    """All that decides the result, but for the machine."""
    return {
        "checkpoint": {"name": checkpoint.name, "sha256": digest_of_files(checkpoint.files)},
        "train": {"examples": len(training), "sha256": _digest(training)},
        "held_out": {"examples": len(held_out), "sha256": _digest(held_out)},
        "recipe": dataclasses.asdict(recipe),
    }


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of two levels in one: "recipe.seed" and the like."""
    return {f"{part}.{name}": value for part, values in settings.items() for name, value in values.items()}


def _digest(examples: Examples) -> str:
    text = json.dumps([examples.pairs, [float(label) for label in examples.labels]])
    return hashlib.sha256(text.encode()).hexdigest()


def _parameter_groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """Biases and normalisation are not decayed."""
    matrices = [value for value in model.parameters() if value.ndim > 1]
    vectors = [value for value in model.parameters() if value.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _set_dropout(model: PreTrainedModel, dropout: float | None) -> None:
    if dropout is not None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout


def _synchronised(accelerator: Accelerator, model: Any, is_last: bool) -> contextlib.AbstractContextManager[Any]:
    """Gradients are handed on between processes only with the last batch of a step."""
    return contextlib.nullcontext() if is_last else accelerator.no_sync(model)


def _states(folder: Path) -> dict[int, Path]:
    return {int(path.name.removeprefix(STATE)): path for path in folder.glob(f"{STATE}*")}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
