"""`HybridTrainer` on a task: it minimizes the task's objective and computes zofo's dev scores.

Accuracy at x is already known from the first-order forward pass, so a difference costs one more
forward pass per direction. F1 also needs answers that are generated at x, without dropout.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback

from zofo.config.schema import RunConfig
from zofo.console import quiet
from zofo.environment import resolve_device
from zofo.optim.options import step_values
from zofo.optim.zeroth_loss import ZerothLoss
from zofo.run.display import MetricsFile, TrainingDisplay
from zofo.run.own_rows import NoRows, OwnRows
from zofo.run.peers import Peers
from zofo.saved.layout import METRICS_FILE
from zofo.scoring.drift import Drift
from zofo.scoring.evaluate import evaluate
from zofo.scoring.generate import Writer
from zofo.scoring.watched import Watched
from zofo.tasks.digests import RowDigests
from zofo.tasks.encode import Collator, Encoded
from zofo.tasks.losses import first_examples, losses_and_errors
from zofo.trainer.mixin import HybridArguments, HybridTrainer


class TrainingClock:
    """Counts the seconds of training, without evaluations on dev and without checkpoints.

    Both take equally long for every method, so counting them would hide differences.
    """

    def __init__(self) -> None:
        self._done = 0.0
        self._since: float | None = None

    def start(self, done: float = 0.0) -> None:
        """Start to count from `done`, the seconds of a run that is resumed."""
        self._done, self._since = done, time.monotonic()

    @property
    def seconds(self) -> float:
        """The seconds counted so far."""
        running = 0.0 if self._since is None else time.monotonic() - self._since
        return round(self._done + running, 3)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock inside the block."""
        # Queued kernels belong to training, so the clock waits until they have finished.
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        was_running = self._since is not None
        self._done, self._since = self.seconds, None
        try:
            yield
        finally:
            if was_running:
                self._since = time.monotonic()


class TaskTrainer(HybridTrainer):
    """`HybridTrainer` whose loss is the task's objective and whose dev scores are zofo's."""

    drift: Drift | None = None  # measured at each evaluation
    own: OwnRows = NoRows()
    watched: Watched | None = None  # scored at each evaluation and before training

    def __init__(
        self,
        *args: Any,
        objective: str,
        kind: str,
        dev: Sequence[Encoded],
        collator: Collator,
        writer: Writer,
        zo_objective: str = "loss",
        digests: RowDigests | None = None,
        run_id: str | None = None,
        peers: Peers | None = None,
        **kwargs: Any,
    ) -> None:
        self.reward_tokenizer = writer.tokenizer
        collate = _keeping_examples(collator) if zo_objective == "f1" else collator
        super().__init__(*args, data_collator=collate, eval_dataset=dev, **kwargs)
        self.clock, self.peers = TrainingClock(), peers or Peers()
        self.objective: Any = objective
        self.zo_objective, self.digests, self.run_id = zo_objective, digests, run_id
        self.kind: Any = kind
        self.dev, self.collator, self.writer = dev, collator, writer
        self.model_accepts_loss_kwargs = False  # compute_loss ignores num_items_in_batch.

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The task's training loss."""
        loss, self._shares, self._errors = losses_and_errors(model, inputs, self.objective)
        return (loss, {}) if return_outputs else loss

    def row_losses(
        self, model: nn.Module, outputs: Any, labels: Any, loss: Tensor, num_items_in_batch: Any
    ) -> Tensor:
        """Each example's share of the loss: [examples]."""
        shares: Tensor = self._shares
        return shares / len(shares)

    def examples_of(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """The example of each row of the model's input."""
        if "place" not in inputs:
            return None
        place, candidate = inputs["place"], inputs["candidate"]
        # Each scored token has a place in a row, and a candidate of an example.
        rows = place[:, 0][inputs["token_place"]]
        examples = candidate[:, 0][inputs["token_candidate"]]
        found = torch.zeros(len(inputs["input_ids"]), dtype=torch.int64, device=rows.device)
        return found.index_put((rows,), examples)

    def num_batch_rows(self, inputs: Mapping[str, Any]) -> int:
        """The number of examples. One example may have several rows in the tensors."""
        return len(inputs["gold"])

    @property
    def has_zeroth_loss(self) -> bool:
        """Whether the zeroth-order block follows accuracy or F1."""
        return self.zo_objective != "loss"

    def whole_batch(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any
    ) -> ZerothLoss:
        """The loss 1 − accuracy or 1 − F1 of all examples."""
        return self._first(model, inputs, num_items_in_batch, len(inputs["gold"]))

    def batch_part(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any, num_first: int
    ) -> tuple[ZerothLoss, None]:
        """The loss of the first examples, with its value from the last forward pass."""
        return self._first(model, inputs, num_items_in_batch, num_first), None

    def _first(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any, num: int
    ) -> ZerothLoss:
        batch: Any = self._prepare_inputs(dict(inputs))
        divisor = self._loss_divisor(num_items_in_batch)
        if self.zo_objective == "f1":
            num_tokens = batch["input_ids"].numel()
            answered = _Answered(self, model, batch["examples"][:num], num_tokens, divisor)
            return ZerothLoss(answered, answered.cost)
        is_whole = num == len(batch["gold"])
        examples, share = (batch, 1.0) if is_whole else first_examples(batch, num)
        known = self._shares if self.zo_objective == "loss" else self._errors
        assert known is not None  # The configuration refuses accuracy for tasks without candidates.

        def closure() -> Tensor:
            with self.compute_loss_context_manager():
                _, shares, errors = losses_and_errors(model, examples, self.objective)
            wanted = shares if self.zo_objective == "loss" else errors
            assert wanted is not None
            return self._loss_from(wanted) / divisor

        return ZerothLoss(closure, share, self._loss_from(known[:num]) / divisor)

    def _loss_from(self, values: Tensor) -> Tensor:
        """The mean of the examples' values; or their shares of it, if rows have directions."""
        return values / len(values) if self.is_by_rows else values.mean()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The dev scores, under the names that Trainer gives them."""
        with self.clock.paused():
            metrics = self.peers.from_first(
                lambda: evaluate(
                    self.model,
                    self.dev if eval_dataset is None else eval_dataset,
                    self.collator,
                    kind=self.kind,
                    batch_size=self.args.per_device_eval_batch_size,
                    writer=self.writer,
                )
            )
            values = metrics.as_dict() | self.own.at_evaluation(self.model)
            if self.drift is not None:
                values["drift"] = self.drift.measure(self.model)
            watch = self.watch_logs()
        logs = {f"{metric_key_prefix}_{key}": value for key, value in values.items()} | watch
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def watch_logs(self) -> dict[str, float]:
        """The scores of the second task, under names that decide nothing; empty without one."""
        watched = self.watched
        if watched is None:
            return {}
        scores = self.peers.from_first(lambda: watched.measure(self.model).as_dict())
        return {f"watch_{key}": value for key, value in scores.items()}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the cost of training so far, so that curves can be drawn against it."""
        if self._hybrid is not None:
            logs["forward_equivalents"] = self.forward_equivalents
            logs["elapsed_s"] = self.clock.seconds
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model and the digests of its rows."""
        super().save_model(output_dir, _internal_call)
        if self.digests is not None and self.args.should_save:
            self.digests.save(Path(output_dir or self._output_folder))

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        # Trainer warns of another batch of one process, and `zofo.run.resume` has compared the
        # batch of all.
        with quiet():
            return super()._init_training_state(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.clock.paused():
            super()._save_checkpoint(model, trial)

    def _accounts(self) -> dict[str, Any]:
        return super()._accounts() | {"elapsed_s": self.clock.seconds, "run": self.run_id}

    def _restore_accounts(self) -> None:
        self.clock.start((self._resumed_accounts or {}).get("elapsed_s", 0.0))
        super()._restore_accounts()


class _Answered:
    """Computes 1 − F1 of generated answers, divided by `divisor`, and counts their cost."""

    def __init__(
        self,
        trainer: TaskTrainer,
        model: nn.Module,
        examples: Sequence[Encoded],
        num_tokens: int,
        divisor: float,
    ) -> None:
        self.trainer, self.model, self.examples = trainer, model, examples
        self.tokens_per_forward, self.divisor = num_tokens, divisor
        self.num_tokens = 0

    def __call__(self) -> float:
        with self.trainer.compute_loss_context_manager():
            written = self.trainer.writer(self.model, [row.prompt for row in self.examples])
        self.num_tokens += written.num_tokens
        answers = [row.answers for row in self.examples]
        scores = [a.f1(text) for a, text in zip(answers, written.texts, strict=True) if a]
        return (1 - math.fsum(scores) / len(scores)) / self.divisor

    def cost(self) -> float:
        """The tokens processed so far, divided by the tokens of one forward pass."""
        return self.num_tokens / self.tokens_per_forward


def _keeping_examples(collator: Collator) -> Callable[[Sequence[Encoded]], dict[str, Any]]:
    """A collator whose batches also hold their examples, which F1 needs."""
    return lambda examples: {**collator(examples), "examples": list(examples)}


class _WatchTheStart(TrainerCallback):
    """Logs the scores of the second task before training, as those of step 0."""

    def __init__(self, trainer: TaskTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            with self.trainer.clock.paused():
                logs = self.trainer.watch_logs()
            self.trainer.log(logs)


class _MeasureAtTheEnd(TrainerCallback):
    """Evaluates and saves the last step, so that it can be selected as the best."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = control.should_log = True
        return control


def _checkpointing(is_wanted: bool) -> dict[str, Any]:
    """The argument of Trainer, whose name depends on the version of transformers."""
    new_name = "activation_checkpointing"
    has_new = new_name in HybridArguments.__dataclass_fields__
    return {new_name if has_new else "gradient_checkpointing": True} if is_wanted else {}


def _arguments(
    config: RunConfig, total_steps: int, folder: Path, num_processes: int
) -> HybridArguments:
    """Translate the configuration into the arguments of Trainer and of the mixin."""
    numbers: Any = config  # `auto` has been replaced by numbers
    every = min(config.eval_every or max(1, total_steps // 4), total_steps)
    return HybridArguments(
        output_dir=str(folder),
        method=config.method,
        base_lr=numbers.base_lr if numbers.base_lr is not None else 0.0,
        learning_rate=numbers.adapter_lr or 0.0,
        optim="adamw_torch" if config.optimizer == "adamw" else "sgd",
        lr_scheduler_type=config.scheduler,
        warmup_steps=config.warmup_steps,
        weight_decay=config.adapter_weight_decay,
        base_weight_decay=config.base_weight_decay,
        base_anchor=config.base_anchor,
        max_grad_norm=config.max_grad_norm or 0.0,
        **step_values(config),
        base_batch_fraction=config.base_batch_fraction,
        on_non_finite=config.on_non_finite,
        snapshot_every=config.snapshot_every,
        sampling=config.sampling,
        max_steps=total_steps,
        per_device_train_batch_size=config.batch_size // num_processes,
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=config.accumulation,
        **_checkpointing(config.gradient_checkpointing),
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,  # The log must show a loss that is not finite.
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,  # the newest and the best
        load_best_model_at_end=config.select_best,
        metric_for_best_model=f"eval_{config.select_by}",
        greater_is_better=config.select_by != "loss",
        seed=config.seed,
        # Without it, accelerate connects no processes where there is no GPU.
        use_cpu=resolve_device(config.device) == "cpu",
        report_to=list(config.report_to) or "none",
        remove_unused_columns=False,  # The rows are objects without columns.
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
    )


def close_displays(trainer: TaskTrainer) -> None:
    """Remove the progress bar from the screen, also after an error in training."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TrainingDisplay):
            callback.close()


def build_trainer(
    config: RunConfig,
    model: nn.Module,
    rows: Mapping[str, Sequence[Encoded]],
    *,
    kind: str,
    collator: Collator,
    writer: Writer,
    original_base: Callable[[], Mapping[str, Tensor]] | None,
    total_steps: int,
    folder: Path,
    console: Console,
    digests: RowDigests | None = None,
    run_id: str | None = None,
    peers: Peers | None = None,
    own: OwnRows | None = None,
    watched: Watched | None = None,
) -> TaskTrainer:
    """The trainer of a run. Building it checks that the method suits the model.

    Args:
        config: the configuration without `auto`.
        model: the model with its adapter.
        rows: encoded rows of "train" and "dev".
        kind: kind of the task.
        collator: makes batches of the rows.
        writer: generates the answers that F1 is computed on.
        original_base: as for `HybridMixin`.
        total_steps: number of optimizer steps.
        folder: the run folder.
        console: the console for the progress.
        digests: those of the rows, which every checkpoint keeps.
        run_id: names the run, in every checkpoint.
        peers: the processes that share each micro-batch; None: one.
        own: the rows of the zeroth-order block's own; None: it follows the examples.
        watched: the second task.
    """
    peers, own = peers or Peers(), own or NoRows()
    written = [MetricsFile(folder / METRICS_FILE)] if peers.is_first else []
    with quiet():
        trainer = TaskTrainer(
            model=model,
            args=_arguments(config, total_steps, folder, peers.size),
            train_dataset=rows["train"],
            original_base=original_base,
            objective=config.task.objective,
            kind=kind,
            dev=rows["dev"],
            collator=collator,
            writer=writer,
            zo_objective=config.zo_objective,
            digests=digests,
            run_id=run_id,
            peers=peers,
            callbacks=[
                *written,
                TrainingDisplay(console, config.batch_size * config.accumulation),
                _MeasureAtTheEnd(),
            ],
            **own.arguments,
        )
    trainer.remove_callback(PrinterCallback)
    trainer.own = own
    if own.arguments and not model.config.is_encoder_decoder:  # type: ignore[union-attr]
        trainer.drift = Drift(model, writer.tokenizer)
    if watched is not None:
        trainer.watched = watched
        trainer.add_callback(_WatchTheStart(trainer))
    return trainer
