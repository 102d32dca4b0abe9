"""Run one training: its steps, what it measures, and the state that it can go on from.

Every process of a distributed training runs the same code on the same plan. A step's batches are dealt out, and each
has random numbers of its own, so that it does not matter how many processes there are. Only the main one writes.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from cappy_engine.batching import Batch, EncodedPairs
from cappy_engine.overlap import ahead
from cappy_engine.pairs import Pair
from cappy_export.adaptation import state
from cappy_export.adaptation.launch import agree, refuse, together
from cappy_export.adaptation.log import LOG, Meter, Progress, append, evaluations, tell_of_result
from cappy_export.adaptation.measuring import HeldOut, score_batch
from cappy_export.adaptation.model_setup import pair_tokenizer, parameter_groups, save_memory
from cappy_export.adaptation.recipe import AdaptOptions, Recipe
from cappy_export.adaptation.saving import Trained, check_unchanged, saved_weights, write_checkpoint
from cappy_export.adaptation.scanning import Scan
from cappy_export.adaptation.schedule import count_steps, plan_parts, seed_of, share_of
from cappy_export.adaptation.shards import Shard
from cappy_export.adaptation.stream import Cursor, Step, Stream, Window, encode_all
from cappy_export.checkpoints.checkpoint import Checkpoint, load_with_head
from cappy_export.checkpoints.models import model_config
from cappy_export.checkpoints.naming import listed
from cappy_export.checkpoints.refusals import refusing
from cappy_export.options import Say


class Run:
    """Hold one training: the model, its optimiser and schedule, the data, and the folder that keeps their state.

    >>> run = Run(accelerator, checkpoint, shards, scan, recipe, options, folder, print)
    >>> run.start(settings)
    >>> run.train(print)
    >>> run.write(Path("my-cappy"), {**settings, "log": run.history()}, force=False)
    """

    def __init__(
        self,
        accelerator: Accelerator,
        checkpoint: Checkpoint,
        shards: Sequence[Shard],
        scan: Scan,
        recipe: Recipe,
        options: AdaptOptions,
        folder: Path,
        say: Say,
    ) -> None:
        self.checkpoint, self.scan = checkpoint, scan
        self.recipe, self.options, self.folder, self.say = recipe, options, folder, say
        self.accelerator = accelerator
        self.encoder, self.pad_token_id = pair_tokenizer(checkpoint, recipe.max_length)
        has_types = (getattr(model_config(checkpoint.config), "type_vocab_size", 0) or 0) > 1
        self.stream = Stream(
            shards,
            self._encode,
            scan.examples,
            scan.threshold,
            window=recipe.window,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            has_types=has_types,
            digests=scan.digests,
        )
        encoded = encode_all(scan.held_out, self._encode, has_types=has_types)
        self.held_out = HeldOut(accelerator, scan.held_out, encoded, self.pad_token_id, recipe.max_batch_tokens)
        self.steps = count_steps(scan.examples, batch_size=recipe.batch_size, epochs=recipe.epochs)
        self.steps = min(self.steps, recipe.max_steps or self.steps)
        self.done, self.cursor, self.best = 0, Cursor(), (math.inf, 0)
        self._windows: Iterator[tuple[Cursor, Cursor, Window]] = iter(())
        self._closing = contextlib.ExitStack()

    def start(self, settings: Mapping[str, Any]) -> None:
        """Load the model, and where that was asked for the state of a stopped training."""
        model = together(self.accelerator, self._load)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, self.recipe.weight_decay), lr=self.recipe.learning_rate, fused=True
        )
        schedule = get_linear_schedule_with_warmup(
            optimizer, round(self.recipe.warmup_fraction * self.steps), self.steps
        )
        with warnings.catch_warnings():  # PyTorch 2.13 calls `broadcast_buffers` otherwise, and accelerate not yet
            warnings.simplefilter("ignore", FutureWarning)
            self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        tflops, processes = self.options.peak_tflops, self.accelerator.num_processes
        meter = Meter(self.flops_per_token, None if tflops is None else tflops * 1e12 * processes)
        self.trained = Trained(self.accelerator, self.model, self.optimizer, schedule, meter, self.options.force)
        if self.options.resume:
            together(self.accelerator, functools.partial(self._take_folder, settings))
            together(self.accelerator, self._resume)
        if self.done == self.steps:  # only the result is left to be written
            return
        of_epoch = count_steps(self.scan.examples, batch_size=self.recipe.batch_size, epochs=1)
        windows = self._closing.enter_context(ahead(self.stream.windows(self.cursor, -(-self.steps // of_epoch))))
        first = together(self.accelerator, lambda: next(windows))
        agree(self.accelerator, {"window": first[2].digest()})
        if not self.options.resume:  # nothing was written before
            together(self.accelerator, functools.partial(self._take_folder, settings))
        self._windows = itertools.chain([first], windows)
        self._tell_of_start(first[2])

    def train(self, progress: Callable[[Progress], object]) -> None:
        """Run the steps that are left. Measure and save as often as the options say."""
        options, processes, meter = self.options, self.accelerator.num_processes, self.trained.meter
        if not self.done:
            constant = {"constant_loss": float(self.scan.held_out.labels.var())} if len(self.scan.held_out) else {}
            self._log({"step": 0, **self.held_out.measure(self.model, 0), **constant})
        window, held_out, started = None, None, time.monotonic()
        for step in self.stream.steps(self._windows, done=self.done):
            if step.number > self.steps:
                break
            if step.window is not window:
                window = step.window
                agree(self.accelerator, {"window": window.digest()} if processes > 1 else {})
            rate, began = float(self.trained.schedule.get_last_lr()[0]), time.monotonic()
            loss, norm = self._step(step)
            tokens, truncated = int(window.lengths[step.rows].sum()), int(window.truncated[step.rows].sum())
            meter.add(loss, tokens=tokens, truncated=truncated, seconds=time.monotonic() - began)
            if step.number % options.log_every == 0:
                self._append(meter.entry(step.number, learning_rate=rate, gradient_norm=norm))
            if step.number % options.evaluate_every == 0 or step.number == self.steps:
                held_out = self.held_out.measure(self.model, step.number)
                self.best = min(self.best, (held_out.get("held_out_loss", math.inf), step.number))
                figures = {"loss": meter.mean(), "learning_rate": rate, **held_out}
                self._log({"step": step.number, **figures, "seconds": round(time.monotonic() - started)})
                started = time.monotonic()
            progress(Progress(step.number, self.steps, loss, rate, tokens, held_out))
            self.done, self.cursor = step.number, step.next
            is_due = step.number % options.save_every == 0 or step.number == self._kept
            if is_due and step.number < self.steps:
                self.trained.save(self.folder, step.number, step.next.document(), keep=self._kept)
                self.accelerator.wait_for_everyone()

    def history(self) -> list[dict[str, Any]]:
        """List all evaluations so far."""
        return evaluations(self.folder) if self.accelerator.is_main_process else []

    @property
    def result(self) -> int:
        """Name the step whose weights are written."""
        return self._kept or self.steps

    @property
    def _kept(self) -> int:
        """Name the step whose state is kept until a better one: 0 is none."""
        return self.best[1] if self.recipe.keep_best else 0

    def write(self, out: Path, document: Mapping[str, Any], *, force: bool) -> None:
        """Publish the checkpoint as `out`, complete or not at all. If that fails, the last step's state is saved."""
        if self.accelerator.is_main_process:
            with self.trained.kept(self.folder, self.done, self.cursor.document(), keep=self._kept):
                if self.result == self.steps:
                    weights = self.trained.weights(self.steps)
                else:
                    weights = saved_weights(self.folder / f"{state.STEP}{self.result}")
                check_unchanged(self.checkpoint, document, way_on=state.way_on(self.folder, force=force))
                write_checkpoint(weights, self.checkpoint, self.folder, out, document, force=force, say=self.say)
            for line in tell_of_result(self.history(), self.steps, is_best=self.recipe.keep_best):
                self.say(line)

    def close(self) -> None:
        """Let another process have the state."""
        self._closing.close()

    def _load(self) -> PreTrainedModel:
        torch.manual_seed(self.recipe.seed)
        model, new = load_with_head(
            self.checkpoint, is_quiet=not self.accelerator.is_main_process, dropout=self.recipe.dropout
        )
        if new:
            self.say(
                f"{self.checkpoint.name} has no head for one score: {len(new)} weights begin at random from seed "
                f"{self.recipe.seed}: {listed(new)}"
            )
        self.flops_per_token = 6.0 * model.num_parameters(exclude_embeddings=True)
        if self.recipe.gradient_checkpointing:
            save_memory(model)
        return model

    def _encode(self, pairs: list[Pair]) -> EncodedPairs:
        with refusing(f"the tokenizer of {self.checkpoint.name} fails on the examples"):
            return self.encoder.encode(pairs)

    def _tell_of_start(self, window: Window) -> None:
        """Say what is trained on what, and what may surprise: truncated examples, and processes without work."""
        device, processes = self.accelerator.device.type, self.accelerator.num_processes
        of_first = "" if len(window) == self.scan.examples else f"of the first {len(window)} "
        self.say(
            f"{self.scan.examples} examples to train on, {len(self.scan.held_out)} held out; {self.steps} steps on "
            f"{device} x {processes}, mixed precision {self.accelerator.mixed_precision}; "
            f"{int(window.truncated.sum())} {of_first}examples truncated to {self.encoder.max_length} tokens"
        )
        tokens = float(window.lengths.mean()) * min(self.recipe.batch_size, len(window))
        batches = math.ceil(tokens / self.recipe.max_batch_tokens)
        if batches < processes:
            self.say(
                f"note: a step has about {batches} batches of {self.recipe.max_batch_tokens} tokens, and there are "
                f"{processes} processes, so that some wait; --max-batch-tokens {math.ceil(tokens / processes)} gives "
                "each a batch"
            )

    def _step(self, step: Step) -> tuple[float, float]:
        """Make one step of the optimiser; return the mean squared error over its rows, and the gradient's norm.

        Processes take the step's batches in turn, and hand on their gradients with the last of them only.
        """
        self.model.train()
        processes, window, rows = self.accelerator.num_processes, step.window, step.rows
        parts = plan_parts(window.lengths[rows], max_batch_tokens=self.recipe.max_batch_tokens)
        mine = share_of(parts, self.accelerator.process_index, processes)
        weight = processes / len(rows)  # processes' gradients are averaged
        if not mine:  # fewer batches than processes: a row that counts for nothing, since all must take part
            mine, weight = [(0, Batch(parts[-1].rows[:1], parts[-1].length))], 0.0
        total = 0.0
        for place, (part, batch) in enumerate(mine):
            picked = rows[batch.rows]
            torch.manual_seed(seed_of(self.recipe.seed, step.number, part))
            with _synchronised(self.accelerator, self.model, place == len(mine) - 1):
                batch = Batch(picked, batch.length)
                scores = score_batch(
                    self.model, window, batch, pad_token_id=self.pad_token_id, device=self.accelerator.device
                )
                labels = torch.from_numpy(window.labels[picked]).to(scores.device)
                loss = (scores - labels).square().sum() * weight
                self.accelerator.backward(loss)
            total += float(loss.detach())
        loss_of_all = torch.tensor(total, dtype=torch.float64, device=self.accelerator.device)
        mean = float(self.accelerator.reduce(loss_of_all, reduction="mean"))
        if not math.isfinite(mean):
            problem = f"the loss of step {step.number} is {mean}; lower the learning rate, or look at the examples"
            refuse(self.accelerator, problem)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.max_gradient_norm)
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:  # fp16 skips steps whose gradients overflowed
            self.trained.schedule.step()
        self.optimizer.zero_grad()
        return mean, math.nan if norm is None else float(norm)

    def _log(self, entry: dict[str, Any]) -> None:
        self._append(entry)
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in entry.items() if name != "step")
        if shown:  # nothing before the first step, if nothing is held out
            self.say(f"step {entry['step']} of {self.steps}: {shown}")

    def _append(self, entry: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            append(self.folder, entry)

    def _take_folder(self, settings: Mapping[str, Any]) -> None:
        """Make the folder of the state, or take one that is there; the main process holds its lock for all."""
        if self.accelerator.is_main_process:
            new = functools.partial(state.begin, force=self.options.force, say=self.say)
            self._closing.enter_context((state.go_on if self.options.resume else new)(self.folder, settings))

    def _resume(self) -> None:
        """Load the last state of a stopped training."""
        states = state.states(self.folder)
        if not states:
            self.say("the training was stopped before its first state was saved: it starts again")
            return
        self.done = max(states)
        self.cursor, self.best = self.trained.load(states[self.done])
        if self._kept and self.accelerator.is_main_process:  # who would else learn only in the end that it is gone
            saved_weights(self.folder / f"{state.STEP}{self._kept}")
        if self.accelerator.is_main_process:
            shutil.copyfile(states[self.done] / LOG, self.folder / LOG)
        self.say(f"going on after step {self.done}")


def _synchronised(accelerator: Accelerator, model: Any, is_last: bool) -> contextlib.AbstractContextManager[Any]:
    """Hand gradients on between processes only with the last batch of a step."""
    return contextlib.nullcontext() if is_last else accelerator.no_sync(model)
