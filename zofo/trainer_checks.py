"""What would make a hybrid step wrong without a sign: found before, or at, the first step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zofo.compiled import is_wrapper
from zofo.errors import UserError
from zofo.methods import apply_method, get_method, split_parameters
from zofo.optim import HybridOptimizer


def check_setup(trainer: Any, method: str) -> None:
    """Everything that is known to be wrong before the first step."""
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
    if "zeroth" not in (orders.base, orders.adapter):
        return
    wrong = []
    if args.world_size > 1 or args.n_gpu > 1 or is_sharded(trainer):
        wrong.append("several devices: run on one (CUDA_VISIBLE_DEVICES=0), or choose fo-peft")
    if hasattr(trainer, "_generate_and_score_completions"):
        wrong.append(
            "trainers that generate their batches as they go, such as GRPO, since a loss cannot be "
            "computed again: choose fo-peft"
        )
    if args.fp16 and "first" not in (orders.base, orders.adapter):
        wrong.append("fp16=True, which scales gradients where there are none: use bf16=True")
    base = split_parameters(trainer.model).base if orders.base == "zeroth" else {}
    if base and _reference_is_the_base(trainer):
        wrong.append(
            "a reference model that is this base, which moves: pass precompute_ref_log_probs=True "
            "or a ref_model of its own"
        )
    if wrong:
        raise UserError(f"method {method!r} does not work with " + "; nor with ".join(wrong))


def _reference_is_the_base(trainer: Any) -> bool:
    """Trl's preference trainers take the model without its adapter as the reference."""
    precomputed = getattr(trainer.args, "precompute_ref_log_probs", True)
    return not precomputed and getattr(trainer, "ref_model", None) is None


def check_same(loss: Tensor, again: Tensor, trainer: type) -> None:
    """The loss difference means nothing unless a second evaluation gives the same loss."""
    if not torch.allclose(loss.double(), again.double(), rtol=1e-3, atol=1e-6, equal_nan=True):
        raise UserError(
            f"the loss of {trainer.__name__} is {loss:.6g}, and {again:.6g} when computed again on "
            "the same batch; a loss difference needs a compute_loss without side effects or "
            "randomness of its own"
        )


def is_sharded(trainer: Any) -> bool:
    """Whether FSDP or DeepSpeed holds the weights."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
