"""What would make a hybrid step wrong without a sign: found before, or at, the first step."""

from __future__ import annotations

from typing import Any

from zofo.errors import UserError
from zofo.optim.batch_part import check_fraction
from zofo.optim.blocks import split_parameters
from zofo.optim.methods import apply_method, get_method
from zofo.optim.optimizer import HybridOptimizer
from zofo.perturb.compiled import is_wrapper


def check_setup(trainer: Any, options: Any) -> None:
    """Everything that is known to be wrong before the first step."""
    method = options.method
    orders = get_method(method)
    if any(map(is_wrapper, trainer.model.modules())):
        raise UserError(
            "the model is or holds what torch.compile(module) returned, so checkpoints would carry "
            "other names; pass torch_compile=True, or compile in place: module.compile()"
        )
    apply_method(trainer.model, method)
    args = trainer.args
    if trainer.optimizer is not None and not isinstance(trainer.optimizer, HybridOptimizer):
        raise UserError(
            f"optimizers holds {type(trainer.optimizer).__name__}; choose the adapter's optimizer "
            "by optim or optimizer_cls_and_kwargs, or pass a zofo.HybridOptimizer"
        )
    if not orders.zeroth:
        return
    wrong = []
    fraction = options.base_batch_fraction
    check_fraction(fraction)
    if not orders.first:
        if options.base_every > 1:
            wrong.append(
                f"base_every={options.base_every}, as nothing else moves between: leave it at 1"
            )
        if fraction < 1:
            wrong.append(
                f"base_batch_fraction={fraction}, as the rest of the batch serves nothing else: "
                "lower the batch size"
            )
    if args.world_size > 1 or args.n_gpu > 1 or is_sharded(trainer):
        wrong.append("several devices: run on one (CUDA_VISIBLE_DEVICES=0), or choose fo-peft")
    if hasattr(trainer, "_generate_and_score_completions"):
        wrong.append(
            "trainers that generate their batches as they go, such as GRPO, since a loss cannot be "
            "computed again: choose fo-peft"
        )
    if args.fp16 and not orders.first:
        wrong.append("fp16=True, which scales gradients where there are none: use bf16=True")
    base = split_parameters(trainer.model).base if orders.base == "zeroth" else {}
    if base and _reference_is_the_base(trainer):
        wrong.append(
            "a reference model that is this base, which moves: pass precompute_ref_log_probs=True "
            "or a ref_model of its own"
        )
    if fraction < 1:
        wrong += _no_random_rows(trainer, options, fraction)
    if wrong:
        raise UserError(f"method {method!r} does not work with " + "; nor with ".join(wrong))


def _no_random_rows(trainer: Any, options: Any, fraction: float) -> list[str]:
    """Why the first rows of a batch would not stand for the batch."""
    args, wrong = trainer.args, []
    if getattr(args, "train_sampling_strategy", "random") != "random":
        wrong.append(
            f"base_batch_fraction={fraction} and train_sampling_strategy="
            f"{args.train_sampling_strategy!r}, where the first rows of a batch are no random "
            "ones: use 'random'"
        )
    elif options.sampling == "shuffle-once":
        wrong.append(
            f"base_batch_fraction={fraction} and sampling='shuffle-once', where the base would "
            "never see the last rows of a batch: use 'reshuffle'"
        )
    own = [cls for cls in type(trainer).__mro__ if cls.__module__.startswith("trl.")]
    if own and not any(cls.__name__ == "SFTTrainer" for cls in own):
        wrong.append(
            f"base_batch_fraction={fraction} and {own[0].__name__}, whose batches do not hold one "
            "sample a row: leave it at 1"
        )
    if getattr(args, "packing", False) or getattr(args, "padding_free", False):
        wrong.append(
            f"base_batch_fraction={fraction} and packing or padding_free, which run samples "
            "together in one row: leave it at 1, or switch them off"
        )
    return wrong


def _reference_is_the_base(trainer: Any) -> bool:
    """Trl's preference trainers take the model without its adapter as the reference."""
    precomputed = getattr(trainer.args, "precompute_ref_log_probs", True)
    return not precomputed and getattr(trainer, "ref_model", None) is None


def is_sharded(trainer: Any) -> bool:
    """Whether FSDP or DeepSpeed holds the weights."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
