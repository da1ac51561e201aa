"""Hybrid fine-tuning in `transformers.Trainer`'s own loop.

The Trainer's forward and backward stay as they are. After them the mixin evaluates the same
micro-batch at the perturbed base and hands the difference to `HybridOptimizer`, which Trainer steps
like any other: logging, schedulers, callbacks, accumulation and `report_to` come with it.

    class HybridSFTTrainer(HybridMixin, trl.SFTTrainer): ...

Checkpoints hold the adapter and the base's trajectory, because an adapter without the base it was
trained with is the wrong model.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from zofo.checkpoint import BaseHistory, is_peft, load_adapter, save_prompt_encoder
from zofo.checkpoint_files import newest_whole, remove_leftovers, rotate, writing_folder
from zofo.environment import peak_memory_bytes
from zofo.errors import UserError
from zofo.estimator import GeneratorState
from zofo.files import write_json
from zofo.methods import get_method, param_groups
from zofo.optim import HybridOptimizer
from zofo.part import Part, batch_rows, num_rows_of, split_rows
from zofo.reshuffle import ReshufflingSampler
from zofo.trainer_checks import check_part, check_same, check_setup, is_sharded
from zofo.trajectory import Trajectory
from zofo.watch import StopOnNonFinite

ACCOUNTS_FILE: Final = "zofo_accounts.json"


@dataclass
class HybridOptions:
    """The hybrid options beside `TrainingArguments`; usable with any subclass of it.

    The adapter's learning rate is `learning_rate`, its optimizer `optim`, its clipping
    `max_grad_norm`, all Trainer's own.
    """

    method: str = field(
        default="hybrid", metadata={"help": "hybrid, fo-peft, zo-peft, fo-ft or zo-ft"}
    )
    base_lr: dict[str, float] | float | str = field(
        default=1e-5,
        metadata={"help": "learning rate of the base, or a map from name patterns to rates"},
    )
    eps: float = field(default=1e-3, metadata={"help": "smoothing radius (as in MeZO)"})
    estimator: str = field(default="forward", metadata={"help": "forward (paper) or central"})
    num_directions: int = field(default=1, metadata={"help": "directions a step (paper: 1)"})
    distribution: str = field(
        default="rademacher", metadata={"help": "rademacher (fast) or gaussian (paper)"}
    )
    base_every: int = field(
        default=1, metadata={"help": "steps from one move of the base to the next (paper: 1)"}
    )
    base_batch_fraction: float = field(
        default=1.0, metadata={"help": "part of each batch that the loss difference is taken on"}
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
        default=True,
        metadata={"help": "on the first step, look for unperturbed reads and unsteady losses"},
    )
    on_non_finite: str = field(
        default="stop",
        metadata={"help": "at a loss or scalar that is not finite: stop (checkpointed), or skip"},
    )
    snapshot_every: int | None = field(
        default=None,
        metadata={"help": "steps between copies of the base, so that resuming replays less"},
    )


@dataclass
class HybridArguments(HybridOptions, TrainingArguments):
    """`transformers.TrainingArguments` and the hybrid options."""


class _RestoreAccounts(TrainerCallback):
    """Once Trainer has set its sums to nothing."""

    def __init__(self, trainer: HybridMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._restore_accounts()


class HybridMixin:
    """Put before any `transformers.Trainer` class: `class T(HybridMixin, SFTTrainer)`.

    The options are read from `args` where it carries them (`HybridArguments`), else from
    `hybrid=HybridOptions(...)`.

    Args:
        hybrid: the options, for argument classes that do not carry them.
        original_base: returns the base as it was before training, name -> tensor; used to go back
            to the best checkpoint. Default: a copy written beside the checkpoints while needed.

    Raises:
        UserError: if the method does not fit the model, the arguments or the hardware.
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
        self._history: BaseHistory | None = None  # where the base moves by the zeroth order
        self._measured_step: int | None = None
        self._loss_is_checked = False
        self._base_lr: float | None = None
        self._checkpoints_folder: Path | None = None  # while a checkpoint is written
        self._resumed_accounts: dict[str, float] | None = None
        super().__init__(*args, **kwargs)
        check_setup(self, self.hybrid_options)
        self.watch = StopOnNonFinite(self, self.hybrid_options.on_non_finite)
        self.add_callback(self.watch)  # type: ignore[attr-defined]
        self.add_callback(_RestoreAccounts(self))  # type: ignore[attr-defined]

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

    @property
    def hybrid_optimizer(self) -> HybridOptimizer:
        """The optimizer of both blocks, once training has begun."""
        assert self._hybrid is not None
        return self._hybrid

    @property
    def trajectory(self) -> Trajectory | None:
        """How the base has moved; None where it is not of the zeroth order."""
        return None if self._history is None else self._history.optimizer.trajectory

    @property
    def base_fingerprint(self) -> str | None:
        """Of the base before training; None where it is not of the zeroth order."""
        return None if self._history is None else self._history.fingerprint

    @property
    def forward_equivalents(self) -> float:
        """Cost of training so far, in forwards of one micro-batch without gradients."""
        optimizer, trainer = self.hybrid_optimizer, self
        method = get_method(self.hybrid_options.method)
        num_batches = optimizer.step_count * trainer.args.gradient_accumulation_steps  # type: ignore[attr-defined]
        cost = num_batches * max(1, method.forwards_per_gradient) + optimizer.num_forwards
        return int(cost) if cost == int(cost) else round(cost, 3)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; `True` takes the newest checkpoint that is whole.

        The copy of the original base is removed when training has ended well.
        """
        trainer: Any = self
        folder = Path(trainer.args.output_dir)
        if trainer.args.should_save:
            remove_leftovers(folder)
        if resume_from_checkpoint is True:
            newest = newest_whole(folder, lambda text: warnings.warn(text, stacklevel=3))
            resume_from_checkpoint = True if newest is None else str(newest)
        self._resumed_accounts = None
        output = super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        if self._history is not None:
            self._history.drop_copies()
        return output._replace(training_loss=output.metrics["train_loss"])

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's hook: one `HybridOptimizer` for both blocks."""
        trainer: Any = self
        self._measured_step, self._loss_is_checked = None, False
        if trainer.optimizer is None:
            self._hybrid = self._history = None
            trainer.optimizer = self._new_optimizer(trainer.model if model is None else model)
        if self._hybrid is None:
            optimizer = self._hybrid = trainer.optimizer
            if optimizer.trajectory.groups:
                folder = Path(trainer.args.output_dir)
                self._history = BaseHistory(
                    trainer.model,
                    optimizer,
                    folder,
                    self._original_base,
                    getattr(self.hybrid_options, "snapshot_every", None),
                )
        if self._history is not None and trainer.args.load_best_model_at_end:
            self._history.keep_original()
        return trainer.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Trainer's forward and backward, then the loss differences of the same micro-batch."""
        trainer: Any = self
        optimizer = self._hybrid
        assert optimizer is not None
        if self._measured_step != trainer.state.global_step:
            # A gradient scaler may have skipped the step before; what it measured is void.
            optimizer._forget_measurements()
        self._measured_step = trainer.state.global_step
        rates = [g["lr"] for g in optimizer.param_groups if g.get("block", "base") == "base"]
        self._base_lr = float(rates[0]) if rates else None
        if not optimizer.zeroth_is_due:
            loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
            optimizer.measure(lambda: loss, loss)
            return loss

        def closure() -> Tensor:
            return self._loss_of(model, inputs, num_items_in_batch)

        view = optimizer.perturbation
        if view is not None and model is not view.model:
            view.follow(model)  # as accelerate has wrapped it
        generators = GeneratorState.capture()
        if optimizer.inner is not None:
            loss = super().training_step(model, dict(inputs), num_items_in_batch)  # type: ignore[misc]
        else:
            model.train()
            with torch.no_grad():
                loss = closure().detach()
        part, rest = self._part_and_rest(model, inputs, num_items_in_batch)
        if part is not None and not self._is_exact(generators):
            part, rest = replace(part, loss=None), None
        with _metrics_set_aside(trainer):
            if self._is_to_be_checked(optimizer):
                graph = optimizer.evaluates_with_graph
                with generators.replayed(), torch.set_grad_enabled(graph):
                    check_same(loss, closure().detach(), type(self))
                    if part is not None and rest is not None:
                        losses = part.closure().detach(), rest.closure().detach()
                        check_part(loss, *losses, type(self))
            self._loss_is_checked = True
            optimizer.measure(closure, loss, generators, part)
        return loss

    def batch_part(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any, num_first: int
    ) -> tuple[Part, Part | None]:
        """The first rows of a micro-batch and the others, after the pass over all of them.

        Override it for batches that cannot be cut along the first dimension of their tensors, or
        to hand over the part's unperturbed loss.

        Args:
            model: the model.
            inputs: the micro-batch, as for `training_step`.
            num_items_in_batch: likewise.
            num_first: rows of the part; fewer than the micro-batch has.

        Returns:
            The part, and the rest of the micro-batch for a check at the first step; None: no check.

        Raises:
            UserError: if the batch cannot be cut.
        """
        num_rows = batch_rows(inputs)

        def taken(rows: Mapping[str, Any], num: int) -> Part:
            share = num / num_rows
            # Divided by its share of the batch's tokens, a sum estimates the batch's.
            items = None if num_items_in_batch is None else num_items_in_batch * share
            return Part(lambda: self._loss_of(model, rows, items), share)

        first, rest = split_rows(inputs, num_first)
        return taken(first, num_first), taken(rest, num_rows - num_first)

    def num_batch_rows(self, inputs: Mapping[str, Any]) -> int:
        """Rows of a micro-batch that `batch_part` can choose from."""
        return batch_rows(inputs)

    def _part_and_rest(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any
    ) -> tuple[Part | None, Part | None]:
        fraction = getattr(self.hybrid_options, "base_batch_fraction", 1.0)
        if fraction == 1:
            return None, None
        num_rows = self.num_batch_rows(inputs)
        num_first = num_rows_of(fraction, num_rows)
        if num_first == num_rows:
            return None, None
        return self.batch_part(model, inputs, num_items_in_batch, num_first)

    def _is_exact(self, generators: GeneratorState) -> bool:
        """Whether a row's loss in the pass just made is what it would be in a smaller batch."""
        trainer: Any = self
        return (
            trainer.args.device.type in ("cpu", "cuda")  # whose generators are known
            and not (trainer.args.bf16 or trainer.args.fp16)
            and all(p.dtype in (torch.float32, torch.float64) for p in trainer.model.parameters())
            and generators.is_current()
            and not self.hybrid_optimizer.evaluates_with_graph
        )

    def _loss_of(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any
    ) -> Tensor:
        """The loss of a micro-batch, scaled as Trainer scales it."""
        trainer: Any = self
        batch = trainer._prepare_inputs(dict(inputs))
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, batch, num_items_in_batch=num_items_in_batch)
        return loss / self._loss_divisor(num_items_in_batch)

    def _loss_divisor(self, num_items_in_batch: Any) -> int:
        scaled = _is_scaled(self, num_items_in_batch)
        return 1 if scaled else self.current_gradient_accumulation_steps  # type: ignore[attr-defined]

    def _is_to_be_checked(self, optimizer: HybridOptimizer) -> bool:
        wanted = self.hybrid_options.self_check and optimizer.replay_dropout
        return wanted and not self._loss_is_checked

    def _new_optimizer(self, model: Any) -> HybridOptimizer:
        trainer: Any = self
        options, args = self.hybrid_options, trainer.args
        decayed = set(trainer.get_decay_parameter_names(model))
        chosen = getattr(trainer, "optimizer_cls_and_kwargs", None)
        inner_class, inner_kwargs = chosen or trainer.get_optimizer_cls_and_kwargs(args, model)
        is_plain = isinstance(inner_class, type) and not hasattr(inner_class, "eval")
        if not is_plain or {"params", "model", "optimizer_dict"} & inner_kwargs.keys():
            raise UserError(
                f"optim is {args.optim!r}, which makes its own parameter groups or switches "
                "between training and evaluation; choose a plain one, such as adamw_torch or sgd"
            )
        return HybridOptimizer(
            param_groups(
                model,
                options.method,
                base_lr=_rates(options.base_lr),
                adapter_lr=inner_kwargs.get("lr", args.learning_rate),
                base_weight_decay=options.base_weight_decay,
                adapter_weight_decay=args.weight_decay,
                no_decay=[n for n, _ in model.named_parameters() if n not in decayed],
            ),
            model,
            optimizer=inner_class,
            optimizer_kwargs={k: v for k, v in inner_kwargs.items() if k != "lr"},
            eps=options.eps,
            estimator=options.estimator,
            num_directions=options.num_directions,
            distribution=options.distribution,
            base_every=getattr(options, "base_every", 1),
            seed=args.seed if options.zo_seed is None else options.zo_seed,
            replay_dropout=options.replay_dropout,
            self_check=options.self_check,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        trainer: Any = self
        dataset = trainer.train_dataset if train_dataset is None else train_dataset
        strategy = getattr(trainer.args, "train_sampling_strategy", "random")
        if not hasattr(dataset, "__len__") or strategy != "random":
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        seed = trainer.args.data_seed if trainer.args.data_seed is not None else trainer.args.seed
        return ReshufflingSampler(len(dataset), seed=seed, sampling=self.hybrid_options.sampling)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the zeroth-order quantities to the training logs."""
        optimizer = self._hybrid
        if optimizer is not None and "loss" in logs and optimizer.last_step is not None:
            report = optimizer.last_step
            # Between two moves of the base, the last one is what there is to say about it.
            measured = optimizer.last_measured
            if measured is not None:
                scalars = measured.projected_grad
                logs["projected_grad"] = sum(scalars) / len(scalars)
            if self._base_lr is not None:
                logs["base_lr"] = self._base_lr
            logs["zo_forwards"] = round(optimizer.num_forwards, 3)
            logs["forward_equivalents"] = self.forward_equivalents
            logs["non_finite"] = float(report.non_finite)
            norms = {} if measured is None else dict(measured.update_norms)
            norms = {} if report.non_finite else norms
            for block, norm in (norms | dict(report.update_norms)).items():
                logs[f"{block}_update_norm"] = norm
            watch = self.watch.watch
            if watch and measured is not None and measured.loss and not measured.non_finite:
                logs["signal_to_rounding"] = watch.signal_to_rounding(
                    measured.loss, measured.projected_grad
                )
            logs["peak_memory_bytes"] = peak_memory_bytes(self.args.device)  # type: ignore[attr-defined]
        if "train_loss" in logs:  # of all steps, also where some were taken before a resume
            trainer: Any = self
            logs["train_loss"] = trainer._total_loss_scalar / max(trainer.state.global_step, 1)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter (or the model) and, where the base moved, its trajectory."""
        trainer: Any = self
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        if not trainer.args.should_save:
            return
        folder = Path(output_dir or trainer.args.output_dir)
        save_prompt_encoder(trainer.model, folder)
        if self._history is not None:
            self._history.save(folder)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._checkpoints_folder or super()._get_output_dir(trial))  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer's, in a hidden folder that takes its name when it is whole."""
        trainer: Any = self
        args, state = trainer.args, trainer.state
        if args.world_size > 1 or is_sharded(trainer):
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            return
        run_folder = Path(self._get_output_dir(trial))
        place = run_folder / f"checkpoint-{state.global_step}"
        if trial is not None:
            run_folder.mkdir(exist_ok=True)
        if state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(place)
        pushes, args.push_to_hub = args.push_to_hub, False
        try:
            with writing_folder(place) as staged:
                self._checkpoints_folder = staged.parent
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
                self._name_best(run_folder, place)
                state.save_to_json(str(staged / "trainer_state.json"))
                write_json(staged / ACCOUNTS_FILE, self._accounts())
        finally:
            self._checkpoints_folder, args.push_to_hub = None, pushes
        if self._history is not None:
            self._history.take_snapshot()
        rotate(
            run_folder,
            args.save_total_limit,
            newest=state.global_step,
            best=state.best_global_step,
        )
        if pushes:
            trainer._push_from_checkpoint(str(place))

    def _name_best(self, run_folder: Path, coming: Path | None = None) -> None:
        """The best checkpoint lies where this run does, which may have been moved."""
        trainer: Any = self
        step = trainer.state.best_global_step
        best = run_folder / f"checkpoint-{step}"
        if step and (best == coming or best.is_dir()):
            trainer.state.best_model_checkpoint = str(best)

    def _accounts(self) -> dict[str, float]:
        """The sums behind the logged losses, which Trainer begins anew when it resumes."""
        trainer: Any = self
        return {
            "loss_since_log": float(trainer._tr_loss),
            "last_logged_step": trainer._globalstep_last_logged,
            "loss_until_log": trainer._total_loss_scalar,
        }

    def _restore_accounts(self) -> None:
        trainer: Any = self
        accounts, self._resumed_accounts = self._resumed_accounts, None
        if accounts is not None:
            trainer._tr_loss.fill_(accounts["loss_since_log"])
            trainer._globalstep_last_logged = accounts["last_logged_step"]
            trainer._total_loss_scalar = accounts["loss_until_log"]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = self
        if trainer.state.global_step >= trainer.state.max_steps:
            # Resumed after the last step: Trainer would take one more.
            trainer.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        trainer: Any = self
        if is_peft(trainer.model) and not is_sharded(trainer):
            load_adapter(trainer.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            trainer: Any = self
            trainer.state.compute_steps(trainer.args, trainer.state.max_steps)
            self._name_best(Path(trainer.args.output_dir))
            accounts = Path(checkpoint) / ACCOUNTS_FILE
            if accounts.exists():
                self._resumed_accounts = json.loads(accounts.read_text(encoding="utf-8"))
        if checkpoint is not None and self._history is not None:
            self._history.go_to(Path(checkpoint))
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        optimizer = self._hybrid
        if optimizer is not None and len(optimizer.trajectory):
            # A checkpoint saved with save_only_model carries no count of steps.
            last = optimizer.trajectory.updates[-1][0].step
            optimizer.step_count = max(optimizer.step_count, last + 1)

    def _load_best_model(self) -> None:
        trainer: Any = self
        best = Path(trainer.state.best_model_checkpoint)
        if is_peft(trainer.model) and not is_sharded(trainer):
            load_adapter(trainer.model, best)
        else:
            super()._load_best_model()  # type: ignore[misc]
        if self._history is not None:
            self._history.go_to(best)


class HybridTrainer(HybridMixin, Trainer):
    """`transformers.Trainer` with hybrid steps."""


def _rates(base_lr: Any) -> Any:
    """YAML reads 1e-5 as text, and a command line a map as JSON."""
    if not isinstance(base_lr, str):
        return base_lr
    try:
        return json.loads(base_lr)
    except json.JSONDecodeError as error:
        raise UserError(
            f"base_lr is {base_lr!r}; it must be a number, or a map from name patterns to numbers"
        ) from error


def _is_scaled(trainer: Any, num_items_in_batch: Any) -> bool:
    """Whether compute_loss has divided by the accumulation steps, by Trainer's own rule."""
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is not None:
        return scaled
    counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return counted or trainer.compute_loss_func is not None


@contextmanager
def _metrics_set_aside(trainer: Any) -> Iterator[None]:
    """What trl's trainers collect inside compute_loss is collected once a batch, unperturbed."""
    names = ("_metrics", "_stored_metrics", "_total_train_tokens")
    kept = {name: vars(trainer)[name] for name in names if name in vars(trainer)}
    vars(trainer).update(copy.deepcopy(kept))
    try:
        yield
    finally:
        vars(trainer).update(kept)
