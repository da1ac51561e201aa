"""Hybrid fine-tuning in `transformers.Trainer`'s own loop.

The Trainer's forward and backward stay as they are. After them the mixin evaluates the same
micro-batch at the perturbed base and hands the difference to `HybridOptimizer`, which Trainer steps
like any other: logging, schedulers, callbacks, accumulation and `report_to` come with it.

    class HybridSFTTrainer(HybridMixin, trl.SFTTrainer): ...

Checkpoints hold the adapter and the base's trajectory, because an adapter without the base it was
trained with is the wrong model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from zofo.errors import UserError
from zofo.estimator import GeneratorState
from zofo.files import fingerprint, read_tensors, write_tensors
from zofo.methods import get_method, param_groups, split_parameters
from zofo.optim import HybridOptimizer
from zofo.reshuffle import ReshufflingSampler
from zofo.trajectory import Trajectory

TRAJECTORY_FILE = "base_trajectory.safetensors"
ORIGINAL_BASE_FILE = "base_original.safetensors"


@dataclass
class HybridOptions:
    """The hybrid options beside `TrainingArguments`; usable with any subclass of it.

    The adapter's learning rate is `learning_rate`, its optimizer `optim`, its clipping
    `max_grad_norm`, all Trainer's own.
    """

    method: str = field(
        default="hybrid", metadata={"help": "hybrid, fo-peft, zo-peft, fo-ft or zo-ft"}
    )
    base_lr: Any = field(
        default=1e-5,
        metadata={"help": "learning rate of the base, or a map from name patterns to rates"},
    )
    eps: float = field(default=1e-3, metadata={"help": "smoothing radius (as in MeZO)"})
    estimator: str = field(default="forward", metadata={"help": "forward (paper) or central"})
    num_directions: int = field(default=1, metadata={"help": "directions a step (paper: 1)"})
    distribution: str = field(
        default="rademacher", metadata={"help": "rademacher (fast) or gaussian (paper)"}
    )
    base_weight_decay: float = field(default=0.0, metadata={"help": "decoupled, of the base"})
    zo_seed: int | None = field(
        default=None, metadata={"help": "seed of the directions; default: seed"}
    )
    sampling: str = field(
        default="reshuffle",
        metadata={"help": "reshuffle (paper), shuffle-once or with-replacement"},
    )
    replay_dropout: bool = field(
        default=True, metadata={"help": "same dropout masks for all evaluations of a step"}
    )
    self_check: bool = field(
        default=True, metadata={"help": "watch the first perturbed forward for unperturbed reads"}
    )


@dataclass
class HybridArguments(HybridOptions, TrainingArguments):
    """`transformers.TrainingArguments` and the hybrid options."""


class HybridMixin:
    """Put before any `transformers.Trainer` class: `class T(HybridMixin, SFTTrainer)`.

    The options are read from `args` where it carries them (`HybridArguments`), else from
    `hybrid=HybridOptions(...)`.

    Args:
        hybrid: the options, for argument classes that do not carry them.
        original_base: returns the base as it was before training, name -> tensor; used to go back
            to the best checkpoint. Default: a copy written beside the checkpoints when needed.
    """

    def __init__(
        self,
        *args: Any,
        hybrid: HybridOptions | None = None,
        original_base: Callable[[], Mapping[str, Tensor]] | None = None,
        **kwargs: Any,
    ) -> None:
        self._given_options = hybrid
        self._original_base = original_base
        self._hybrid: HybridOptimizer | None = None
        self.base_fingerprint: str | None = None
        super().__init__(*args, **kwargs)
        get_method(self.hybrid_options.method)

    @property
    def hybrid_options(self) -> Any:
        """The object that carries the hybrid options."""
        if self._given_options is not None:
            return self._given_options
        if hasattr(self.args, "base_lr"):  # type: ignore[attr-defined]
            return self.args  # type: ignore[attr-defined]
        raise UserError(
            f"{type(self.args).__name__} carries no hybrid options; "  # type: ignore[attr-defined]
            "pass hybrid=HybridOptions(...) to the trainer, or use HybridArguments"
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's hook: one `HybridOptimizer` for both blocks."""
        trainer: Any = self
        if trainer.optimizer is not None:
            return trainer.optimizer
        options, args = self.hybrid_options, trainer.args
        target: Any = trainer.model if model is None else model
        moves_base = get_method(options.method).base == "zeroth"
        blocks = split_parameters(target)
        if moves_base:
            self.base_fingerprint = fingerprint(blocks.base)
        decayed = set(trainer.get_decay_parameter_names(target))
        inner_class, inner_kwargs = Trainer.get_optimizer_cls_and_kwargs(args, target)
        groups = param_groups(
            target,
            options.method,
            base_lr=options.base_lr,
            adapter_lr=args.learning_rate,
            base_weight_decay=options.base_weight_decay,
            adapter_weight_decay=args.weight_decay,
            no_decay=[n for n, _ in target.named_parameters() if n not in decayed],
        )
        self._hybrid = HybridOptimizer(
            groups,
            target,
            optimizer=inner_class,
            optimizer_kwargs={k: v for k, v in inner_kwargs.items() if k != "lr"},
            eps=options.eps,
            estimator=options.estimator,
            num_directions=options.num_directions,
            distribution=options.distribution,
            seed=args.seed if options.zo_seed is None else options.zo_seed,
            replay_dropout=options.replay_dropout,
            self_check=options.self_check,
        )
        trainer.optimizer = self._hybrid
        if moves_base and args.load_best_model_at_end and self._original_base is None:
            write_tensors(Path(args.output_dir) / ORIGINAL_BASE_FILE, _plain(blocks.base), {})
            self._original_base = lambda: read_tensors(Path(args.output_dir) / ORIGINAL_BASE_FILE)[
                0
            ]
        return self._hybrid

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Trainer's forward and backward, then the loss differences of the same micro-batch."""
        trainer: Any = self
        optimizer = self._hybrid
        if optimizer is None:  # an optimizer of the user's own
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if optimizer.perturbation is None:
            loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
            optimizer.measure(lambda: loss, loss)
            return loss
        generators = GeneratorState.capture()

        def closure() -> Tensor:
            batch = trainer._prepare_inputs(dict(inputs))
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, batch, num_items_in_batch=num_items_in_batch)
            scaled = trainer.loss_is_scaled_for_ga
            if scaled is None:
                scaled = (
                    trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
                ) or trainer.compute_loss_func is not None
            loss = loss.mean()
            return loss if scaled else loss / trainer.current_gradient_accumulation_steps

        if optimizer.inner is not None:
            loss = super().training_step(model, dict(inputs), num_items_in_batch)  # type: ignore[misc]
        else:
            model.train()
            with torch.no_grad():
                loss = closure().detach()
        # Callbacks of the forward pass (entropy, token counts) have seen the unperturbed model;
        # what they would add at the perturbed point is discarded.
        with _metrics_set_aside(trainer):
            optimizer.measure(closure, loss, generators)
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        trainer: Any = self
        dataset = trainer.train_dataset if train_dataset is None else train_dataset
        if dataset is None or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        seed = trainer.args.data_seed if trainer.args.data_seed is not None else trainer.args.seed
        return ReshufflingSampler(len(dataset), seed=seed, sampling=self.hybrid_options.sampling)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the zeroth-order quantities to the training logs."""
        optimizer = self._hybrid
        if optimizer is not None and "loss" in logs and optimizer.last_step is not None:
            report = optimizer.last_step
            zeroth = [g for g in optimizer.param_groups if g["order"] == "zeroth"]
            if zeroth:
                scalars = report.projected_grad
                logs["projected_grad"] = sum(scalars) / len(scalars)
                key = "base_lr" if zeroth[0]["block"] == "base" else "learning_rate"
                logs[key] = float(zeroth[0]["lr"])
            logs["zo_forwards"] = optimizer.num_forwards
            logs["non_finite"] = float(report.non_finite)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter (or the model) and, where the base moved, its trajectory."""
        trainer: Any = self
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        if self._hybrid is not None and self._hybrid.trajectory.groups and trainer.args.should_save:
            folder = Path(output_dir or trainer.args.output_dir)
            self._hybrid.trajectory.save(
                folder / TRAJECTORY_FILE, base_fingerprint=self.base_fingerprint
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None or self._hybrid is None or not self._hybrid.trajectory.groups:
            return
        # The model is as the user loaded it: the original base, which the trajectory continues.
        self._replay_checkpoint(Path(checkpoint), check_base=True)

    def _load_best_model(self) -> None:
        trainer: Any = self
        super()._load_best_model()  # type: ignore[misc]
        if self._hybrid is None or not self._hybrid.trajectory.groups:
            return
        if self._original_base is not None:
            original = self._original_base()
            for name, parameter in split_parameters(trainer.model).base.items():
                parameter.data.copy_(original[name])
        self._replay_checkpoint(Path(trainer.state.best_model_checkpoint), check_base=True)
        (Path(trainer.args.output_dir) / ORIGINAL_BASE_FILE).unlink(missing_ok=True)

    def _replay_checkpoint(self, folder: Path, *, check_base: bool) -> None:
        trainer: Any = self
        trajectory, header = Trajectory.load(folder / TRAJECTORY_FILE)
        blocks = split_parameters(trainer.model)
        found = fingerprint(blocks.base)
        if check_base and header.get("base_fingerprint") not in (None, found):
            raise UserError(
                f"{folder} continues the base {header['base_fingerprint']}, this model's base is "
                f"{found}; load the base that the run began with"
            )
        trajectory.replay(blocks.base)
        assert self._hybrid is not None
        self._hybrid.trajectory = trajectory


class HybridTrainer(HybridMixin, Trainer):
    """`transformers.Trainer` with hybrid steps."""


def _plain(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().cpu().contiguous() for name, p in parameters.items()}


class _metrics_set_aside:  # noqa: N801
    """Keep what trainers collect inside compute_loss (trl's `_metrics`) as it was."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def __enter__(self) -> None:
        metrics = getattr(self.trainer, "_metrics", None)
        self.kept = (
            {mode: {k: list(v) for k, v in values.items()} for mode, values in metrics.items()}
            if isinstance(metrics, dict)
            else None
        )
        self.tokens = getattr(self.trainer, "_total_train_tokens", None)

    def __exit__(self, *exception: object) -> None:
        if self.kept is not None:
            for mode, values in self.kept.items():
                live = self.trainer._metrics[mode]
                for key in list(live):
                    live[key] = values.get(key, [])
        if self.tokens is not None:
            self.trainer._total_train_tokens = self.tokens
