"""Hybrid fine-tuning in the training loop of `transformers.Trainer`.

The forward and backward pass of Trainer stay unchanged. After them the mixin evaluates the same
micro-batch at the perturbed weights and passes the loss difference to `HybridOptimizer`. Trainer
calls its `step` like that of any optimizer, so logging, schedulers, callbacks, gradient
accumulation and `report_to` keep working.

    class HybridSFTTrainer(HybridMixin, trl.SFTTrainer): ...

`zofo.trainer.checkpoints` saves and restores; `zofo.trainer.losses` evaluates the losses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from zofo.environment import peak_memory_bytes
from zofo.errors import UserError
from zofo.models.layers import backward_share
from zofo.optim.blocks import is_peft
from zofo.optim.cost import forward_equivalents
from zofo.optim.gradient_bytes import GradientBytes
from zofo.optim.methods import get_method, param_groups
from zofo.optim.optimizer import HybridOptimizer
from zofo.optim.reshuffle import RankBatches, ReshufflingSampler
from zofo.optim.trajectory import Trajectory
from zofo.optim.zeroth_loss import ZerothLoss
from zofo.rewards.functions import Given
from zofo.rewards.options import RewardOptions
from zofo.tasks.preference import PreferenceOptions
from zofo.trainer.base_history import BaseHistory
from zofo.trainer.checkpoints import CheckpointMixin, RestoreAccounts
from zofo.trainer.checks import allowing_scales, can_be_hashed, check_setup, has_shards
from zofo.trainer.losses import BatchLossMixin, metrics_set_aside
from zofo.trainer.options import HybridArguments as HybridArguments
from zofo.trainer.options import HybridOptions, read_rates
from zofo.trainer.watch import StopOnNonFinite


class HybridMixin(CheckpointMixin, BatchLossMixin):
    """Adds hybrid steps to any `transformers.Trainer` class: `class T(HybridMixin, SFTTrainer)`.

    The options come from `args` if it holds them (`HybridArguments`), otherwise from
    `hybrid=HybridOptions(...)`.

    Args:
        hybrid: the options, for argument classes that do not hold them.
        reward_funcs: rewards that the zeroth-order block follows instead of the loss: functions
            with TRL's signature, or names as of `zofo.rewards.functions`; a first-order block still
            follows the loss of the training data.
        reward_weights: one for each reward; None: 1.
        reward_dataset: rows with the key "prompt", a text or chat messages, and further columns for
            the rewards; None: those of `train_dataset`.
        reward: how answers are written and compared.
        preference_dataset: preference pairs whose margin the zeroth-order block follows: a
            `PairSource`, or rows with the keys prompt, chosen and rejected, texts or chat messages.
            Let the examples of `train_dataset` be the chosen answers.
        preference: how pairs are compared.
        original_base: returns the base before training, name -> tensor. It is needed to return to
            the best checkpoint, and for `base_anchor`. Default: a temporary copy beside the
            checkpoints.

    Raises:
        UserError: if the method does not fit the model, the arguments or the hardware.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(HybridMixin):
            other = next(base for base in cls.__bases__ if issubclass(base, Trainer)).__name__
            raise UserError(
                f"class {cls.__name__} lists {other} before HybridMixin, so Trainer's own steps "
                f"would run; write class {cls.__name__}(HybridMixin, {other})"
            )

    def __init__(
        self,
        *args: Any,
        hybrid: HybridOptions | None = None,
        original_base: Callable[[], Mapping[str, Tensor]] | None = None,
        reward_funcs: Given | None = None,
        reward_weights: Sequence[float] | None = None,
        reward_dataset: Any = None,
        reward: RewardOptions | None = None,
        preference_dataset: Any = None,
        preference: PreferenceOptions | None = None,
        **kwargs: Any,
    ) -> None:
        # Trainer's __init__ may call methods of this class, so the attributes are set before it.
        self._given_options, self._original_base = hybrid, original_base
        self._hybrid = self._history = None
        self._measured_step: int | None = None
        self._parts_are_checked = False
        self._base_lr: float | None = None
        self._gradient_bytes = GradientBytes()
        self._checkpoints_folder = self._resumed_accounts = None
        with allowing_scales(args[0] if args else kwargs.get("model")):
            super().__init__(*args, **kwargs)
        check_setup(self, self.hybrid_options)
        if reward_funcs is not None:
            seed = self.hybrid_options.zo_seed
            self._take_rewards(reward_funcs, reward_weights, reward_dataset, reward, seed)
        if preference_dataset is not None:
            self._take_pairs(preference_dataset, preference, self.hybrid_options.zo_seed)
        self.watch = StopOnNonFinite(self, self.hybrid_options.on_non_finite)
        self.add_callback(self.watch)
        self.add_callback(RestoreAccounts(self))

    @property
    def trajectory(self) -> Trajectory | None:
        """All updates of the base; None unless the base is of zeroth order."""
        return None if self._history is None else self._history.optimizer.trajectory

    @property
    def base_fingerprint(self) -> str | None:
        """Fingerprint of the base before training; None unless the base is of zeroth order."""
        return None if self._history is None else self._history.fingerprint

    @property
    def forward_equivalents(self) -> float:
        """Cost of training so far in forward-equivalents, including first-order passes.

        One unit is one forward pass of a micro-batch without gradients. The gradient of an adapter
        costs 2 units and that of all weights 3, less if it ends above the lowest layer; see
        `zofo.optim.cost`.
        """
        optimizer = self.hybrid_optimizer
        num_passes = optimizer.step_count * self.args.gradient_accumulation_steps
        return forward_equivalents(
            num_passes if self.has_examples else 0,
            get_method(self.hybrid_options.method).forwards_per_gradient,
            optimizer.num_forwards,
            backward_share(self.model),
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create one `HybridOptimizer` for both blocks; Trainer calls this."""
        self._measured_step, self._parts_are_checked = None, False
        self._shares_are_checked = False
        if self.optimizer is None:
            self._hybrid = self._history = None
            self._keep_original()
            self.optimizer = self._new_optimizer(self.model if model is None else model)
        if self._hybrid is None:
            optimizer = self._hybrid = self.optimizer
            if optimizer.trajectory.groups:  # Without them, the base has no updates to record.
                self._history = BaseHistory(
                    self.model,
                    optimizer,
                    self._output_folder,
                    self._original_base,
                    self.hybrid_options.snapshot_every,
                )
            elif is_peft(self.model) and can_be_hashed(self):
                optimizer.original_fingerprint()  # so that a resume refuses another base
        if self._history is not None and self.args.load_best_model_at_end:
            self._history.keep_original()
        has_no_gradient = self.hybrid_optimizer.inner is None
        if self.hybrid_optimizer.processes is not None and (has_no_gradient or has_shards(self)):
            # DistributedDataParallel refuses a model without gradients, and none have to be joined.
            # Of shards, FSDP2 joins them.
            prepare: Any = type(self.accelerator).prepare_model
            vars(self.accelerator)["prepare_model"] = functools.partial(
                prepare, self.accelerator, evaluation_mode=True
            )
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Run Trainer's forward and backward, then the loss differences of the micro-batch.

        Returns:
            The unperturbed loss, detached, shape [].
        """
        optimizer = self._hybrid
        assert optimizer is not None
        if optimizer.processes is not None:
            self.weigh_rows(inputs, optimizer.processes)
            if isinstance(model, DistributedDataParallel):
                self._gradient_bytes.count(model)
        if self._measured_step != self.state.global_step:
            # If a gradient scaler skipped the previous step, its measurements are invalid.
            optimizer.discard_measurements()
            self._number_in_step = -1
        self._number_in_step += 1
        self._measured_step = self.state.global_step
        rates = [g["lr"] for g in optimizer.param_groups if g.get("block", "base") == "base"]
        self._base_lr = float(rates[0]) if rates else None
        if not optimizer.zeroth_is_due:  # A step between two updates of the base (`base_every`).
            with self.weighing_loss(num_items_in_batch):
                usual = super().training_step(model, inputs, num_items_in_batch)
            optimizer.measure(lambda: usual, usual)
            return usual

        by_rows = self.is_by_rows

        def closure() -> Tensor:
            evaluate = self._row_losses_of if by_rows else self._loss_of
            return evaluate(inner, inputs, num_items_in_batch)

        view, inner = optimizer.perturbation, model
        if isinstance(model, DistributedDataParallel):
            # The wrapper may communicate in each forward, and the processes evaluate different
            # numbers of times.
            inner = model.module
        if view is not None and inner is not view.model:
            view.follow(inner)  # accelerate has wrapped the model.
        # With the state before the pass, the perturbed evaluations repeat its dropout masks.
        generators = optimizer.before_pass()
        noting: AbstractContextManager[list[Tensor]] = nullcontext([])
        if by_rows:
            noting = self.noting_row_losses()
        loss: Tensor | None = None
        with noting as noted:
            if optimizer.inner is not None:
                with self.weighing_loss(num_items_in_batch):
                    loss = super().training_step(model, dict(inputs), num_items_in_batch)
            elif self.has_examples:
                model.train()
                with torch.no_grad():
                    loss = self._loss_of(inner, inputs, num_items_in_batch).detach()  # []
        instead, rest = self._differenced(inner, inputs, num_items_in_batch, generators)
        with metrics_set_aside(self):
            # Unless the masks are replayed, dropout makes two evaluations differ.
            is_wanted = self.hybrid_options.self_check and optimizer.options.replay_dropout
            if (
                is_wanted
                and rest
                and isinstance(instead, ZerothLoss)
                and not self._parts_are_checked
            ):
                whole = self.whole_batch(inner, inputs, num_items_in_batch)
                known = None if self.has_zeroth_loss else loss
                self._check_parts(known, whole, instead, rest, generators)
            self._parts_are_checked = True
            measured = noted[-1] if by_rows else loss
            if measured is not None and loss is not None:
                measured = measured.to(loss.device)
            examples = self.examples_of(inputs)
            optimizer.measure(closure, measured, generators, instead, examples)
        if loss is None:
            loss = torch.as_tensor(self._source_loss, dtype=torch.float32)
            loss = loss.to(self.args.device)
            loss = loss / self.current_gradient_accumulation_steps
        return loss

    def _new_optimizer(self, model: Any) -> HybridOptimizer:
        options, args = self.hybrid_options, self.args
        decayed = set(self.get_decay_parameter_names(model))
        chosen = getattr(self, "optimizer_cls_and_kwargs", None)
        inner_class, inner_kwargs = chosen or self.get_optimizer_cls_and_kwargs(args, model)
        # Schedule-free optimizers have `eval`: they hold other weights while they train.
        is_plain = isinstance(inner_class, type) and not hasattr(inner_class, "eval")
        if not is_plain or {"params", "model", "optimizer_dict"} & inner_kwargs.keys():
            raise UserError(
                f"optim is {args.optim!r}, which builds its own parameter groups or has separate "
                "modes for training and evaluation; choose a plain one: adamw_torch or sgd"
            )
        return HybridOptimizer(
            param_groups(
                model,
                options.method,
                base_lr=read_rates(options.base_lr),
                adapter_lr=inner_kwargs.get("lr", args.learning_rate),
                base_weight_decay=options.base_weight_decay,
                base_anchor=options.base_anchor,
                adapter_weight_decay=args.weight_decay,
                no_decay=[n for n, _ in model.named_parameters() if n not in decayed],
            ),
            model,
            optimizer=inner_class,
            optimizer_kwargs={k: v for k, v in inner_kwargs.items() if k != "lr"},
            seed=args.seed if options.zo_seed is None else options.zo_seed,
            original=self._original,
            options=options,
            **self.reward_changes,
            process_group=dist.group.WORLD if args.world_size > 1 else None,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        strategy = getattr(self.args, "train_sampling_strategy", "random")
        if not hasattr(dataset, "__len__") or strategy != "random":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        return ReshufflingSampler(len(dataset), seed=seed, sampling=self.hybrid_options.sampling)

    def get_train_dataloader(self) -> Any:
        """Trainer's loader; several processes share each batch, and each sample comes once."""
        loader: Any = super().get_train_dataloader()
        shard: Any = getattr(loader, "batch_sampler", None)
        sampler = getattr(getattr(shard, "batch_sampler", None), "sampler", None)
        self._deals_evenly = self.args.world_size > 1 and isinstance(sampler, ReshufflingSampler)
        if self._deals_evenly:
            # accelerate's shard would repeat samples at the end of an epoch. As the shard of one
            # process, with batches of any size, it passes on the batches of this rank.
            shard.batch_sampler = RankBatches(
                sampler,
                self._train_batch_size,
                self.args.process_index,
                self.args.world_size,
                drop_last=self.args.dataloader_drop_last,
            )
            shard.sampler = sampler  # for `set_epoch`, also behind the batches that a resume skips
            shard.num_processes, shard.process_index = 1, 0
            shard.batch_size, shard.even_batches = None, False
        return loader

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the quantities of the zeroth-order steps to the training logs."""
        optimizer = self._hybrid
        if optimizer is not None and "loss" in logs and optimizer.last_step is not None:
            report = optimizer.last_step
            # Between two updates of the base, the logs repeat the numbers of the last one.
            measured = optimizer.last_measured
            # The scalars of answers that are compared with each other have the mean 0.
            if measured is not None and self._rewards is None:
                scalars = measured.projected_grad
                logs["projected_grad"] = sum(scalars) / len(scalars)
            if self._base_lr is not None:
                logs["base_lr"] = self._base_lr
            logs["zo_forwards"] = round(optimizer.num_forwards, 3)
            logs["forward_equivalents"] = self.forward_equivalents
            logs["non_finite"] = float(report.non_finite)
            if optimizer.processes is not None:
                logs["base_bytes_sent"] = optimizer.processes.bytes_sent
                if self._gradient_bytes.sent is not None:
                    logs["gradient_bytes_sent"] = self._gradient_bytes.sent
            earlier = {} if measured is None or report.non_finite else measured.update_norms
            for block, norm in {**earlier, **report.update_norms}.items():
                logs[f"{block}_update_norm"] = norm
            watch = self.watch.watch
            if watch is not None and watch.has_own_loss:
                watch = None
            if watch and measured is not None and measured.loss and not measured.non_finite:
                logs["signal_to_rounding"] = watch.signal_to_rounding(
                    measured.loss, measured.projected_grad
                )
            logs |= self._source_logs()
            logs["peak_memory_bytes"] = peak_memory_bytes(self.args.device)
        if "train_loss" in logs:  # The mean over all steps includes those before a resume.
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, *args, **kwargs)


class HybridTrainer(HybridMixin, Trainer):
    """`transformers.Trainer` with hybrid steps."""
