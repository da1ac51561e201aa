"""Checks that refuse settings before the first step if they would silently train wrongly."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from zofo.errors import UserError
from zofo.optim.batch_part import check_fraction
from zofo.optim.blocks import is_peft, split_parameters
from zofo.optim.methods import anchor_problem, apply_method, get_method
from zofo.optim.optimizer import HybridOptimizer
from zofo.optim.trajectory import MAX_UPDATES
from zofo.perturb import shards
from zofo.perturb.compiled import is_wrapper
from zofo.perturb.quantized import has_moving_scales
from zofo.trainer.options import read_rates


def check_setup(trainer: Any, options: Any) -> None:
    """Raise UserError for a model, method or option that a hybrid trainer cannot train."""
    method = options.method
    orders = get_method(method)
    if any(map(is_wrapper, trainer.model.modules())):
        raise UserError(
            "the model is or contains the result of torch.compile(module), so its checkpoints "
            "would have other names; pass torch_compile=True, or compile in place: module.compile()"
        )
    blocks = apply_method(trainer.model, method)
    _warn_of_random(trainer.model, blocks.base)
    args = trainer.args
    if trainer.optimizer is not None and not isinstance(trainer.optimizer, HybridOptimizer):
        raise UserError(
            f"optimizers holds {type(trainer.optimizer).__name__}; choose the adapter's optimizer "
            "with optim or optimizer_cls_and_kwargs, or pass a zofo.HybridOptimizer"
        )
    if not orders.zeroth:  # All other checks concern zeroth-order steps.
        return
    wrong = []
    fraction = options.base_batch_fraction
    check_fraction(fraction)
    if not orders.first:
        if options.base_every > 1:
            wrong.append(
                f"base_every={options.base_every} would leave some steps without any update: set "
                "it to 1"
            )
        if fraction < 1:
            wrong.append(
                f"base_batch_fraction={fraction} would leave the other rows unused: lower the "
                "batch size"
            )
    if args.n_gpu > 1:
        wrong.append(
            "one process has several devices: start one process for each with torchrun, or set "
            "CUDA_VISIBLE_DEVICES=0"
        )
    started = os.environ.get("WORLD_SIZE", "1")
    if args.world_size == 1 and started != "1" and "RANK" in os.environ:
        wrong.append(
            f"a launcher has started {started} processes, and Trainer does not connect them: pass "
            "use_cpu=True where there is no GPU, or start one process"
        )
    if is_sharded(trainer):
        wrong.append(
            "the FSDP or DeepSpeed of accelerate would shard the base after the optimizer is made: "
            "leave it out of accelerate's configuration, and in a script shard the model with "
            "torch.distributed.fsdp.fully_shard before you make the trainer"
        )
    elif has_shards(trainer):
        wrong += _not_on_shards(trainer, options)
    if hasattr(trainer, "_generate_and_score_completions"):
        wrong.append(
            "a loss cannot be computed again in trainers that generate their batches, such as "
            "GRPO: choose fo-peft"
        )
    if args.fp16 and not orders.first:
        wrong.append("fp16=True scales gradients, and this method has none: use bf16=True")
    base = split_parameters(trainer.model).base if orders.base == "zeroth" else {}
    # trl's preference trainers, such as DPO, use the model without its adapter as the reference.
    precomputed = getattr(args, "precompute_ref_log_probs", True)
    if base and not precomputed and getattr(trainer, "ref_model", None) is None:
        wrong.append(
            "the reference model would change, because it is this base: pass "
            "precompute_ref_log_probs=True, or a separate ref_model"
        )
    rates = read_rates(options.base_lr)
    num_groups = len(rates) if isinstance(rates, dict) else 1
    if base and num_groups * args.max_steps > MAX_UPDATES:
        wrong.append(
            f"{args.max_steps} steps with {num_groups} learning rates of the base are more than "
            f"the {MAX_UPDATES} updates that a trajectory can hold: lower either"
        )
    if base:
        wrong += _no_anchor(trainer, options)
    if fraction < 1:
        wrong += _no_random_rows(trainer, options, fraction)
    if wrong:
        raise UserError(f"method {method!r} cannot train here: " + "; ".join(wrong))


def _no_anchor(trainer: Any, options: Any) -> list[str]:
    """Describe why the base cannot have an anchor here."""
    rates = read_rates(options.base_lr)
    problem = anchor_problem(
        options.base_anchor,
        options.method,
        rates.values() if isinstance(rates, dict) else [float(rates)],
    )
    wrong = [problem] if problem else []
    if options.base_anchor and trainer.args.world_size > 1:
        wrong.append("base_anchor needs one process: start only one, or set it to 0")
    if options.base_anchor and has_shards(trainer):
        wrong.append("base_anchor does not know shards: leave the sharding out, or set it to 0")
    if options.base_anchor and any(map(has_moving_scales, trainer.model.modules())):
        wrong.append(
            "base_anchor does not know the scales of quantised weights: load the base without "
            "quantization, or set it to 0"
        )
    return wrong


def _warn_of_random(model: Any, base: Mapping[str, nn.Parameter]) -> None:
    """Warn of weights of a new head that peft freezes, because it does not know their names."""
    if not is_peft(model) or getattr(model, "is_quantized", False):
        return
    # The embeddings are new after a change of the vocabulary.
    get = getattr(model, "get_input_embeddings", None)
    embeddings = None if get is None else get().weight
    # transformers marks the weights that it loaded.
    is_loaded = {name: hasattr(p, "_is_hf_initialized") for name, p in base.items()}
    new = [n for n, loaded in is_loaded.items() if not loaded and base[n] is not embeddings]
    if new and any(is_loaded.values()):
        modules = sorted({name.rpartition(".")[0] for name in new})
        warnings.warn(
            f"{len(new)} weights of the base are new and random, such as {new[0]}, because the "
            "model's folder lacks them, and the adapter does not train them; make the adapter with "
            f"modules_to_save={modules[:3]}",
            stacklevel=5,
        )


def _no_random_rows(trainer: Any, options: Any, fraction: float) -> list[str]:
    """Describe why the first rows of a batch would not represent the batch."""
    args, wrong = trainer.args, []
    if getattr(args, "train_sampling_strategy", "random") != "random":
        wrong.append(
            f"base_batch_fraction={fraction} needs random rows at the start of a batch, which "
            f"train_sampling_strategy={args.train_sampling_strategy!r} does not give: "
            "use 'random'"
        )
    elif options.sampling == "shuffle-once":
        wrong.append(
            f"base_batch_fraction={fraction} with sampling='shuffle-once' would never show the "
            "base the last rows of a batch: use 'reshuffle'"
        )
    own = [cls for cls in type(trainer).__mro__ if cls.__module__.startswith("trl.")]
    if own and not any(cls.__name__ == "SFTTrainer" for cls in own):
        wrong.append(
            f"base_batch_fraction={fraction} does not fit {own[0].__name__}, whose batches do not "
            "hold one sample a row: set it to 1"
        )
    if getattr(args, "packing", False) or getattr(args, "padding_free", False):
        wrong.append(
            f"base_batch_fraction={fraction} does not fit packing or padding_free, which put "
            "several samples into one row: set it to 1, or switch them off"
        )
    return wrong


@contextmanager
def allowing_scales(model: Any) -> Iterator[None]:
    """Let Trainer take a quantised model without an adapter; zeroth order moves its scales.

    A method that moves no scales is refused by `check_setup`.
    """
    # A PeftModel passes the attribute on to its base, whose own flag stays as it is.
    known = isinstance(model, nn.Module) and not is_peft(model)
    if not known or not any(map(has_moving_scales, model.modules())):
        yield
        return
    before = getattr(model, "_hf_peft_config_loaded", False)
    model._hf_peft_config_loaded = True  # Trainer then believes that there is an adapter.
    try:
        yield
    finally:
        model._hf_peft_config_loaded = before


def can_be_hashed(trainer: Any) -> bool:
    """Whether the base is whole and in memory, so that its bits can be read."""
    weights = split_parameters(trainer.model).base.values()
    return not is_sharded(trainer) and not any(p.is_meta for p in weights)


def is_sharded(trainer: Any) -> bool:
    """Whether the FSDP or DeepSpeed of accelerate shards the weights, or will."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def has_shards(trainer: Any) -> bool:
    """Whether the caller has sharded the model with `fully_shard`."""
    return any(map(shards.is_sharded, trainer.model.parameters()))


def _not_on_shards(trainer: Any, options: Any) -> list[str]:
    """What a trainer cannot do with a model that the caller has sharded."""
    wrong = []
    if not is_peft(trainer.model):
        wrong.append(
            "the model is sharded and has no adapter, so a checkpoint would gather all of it: use "
            "a loop of your own around zofo.HybridOptimizer"
        )
    if options.snapshot_every is not None:
        wrong.append("snapshot_every would gather the sharded base: leave it out")
    if trainer.args.load_best_model_at_end and trainer._original_base is None:
        wrong.append(
            "load_best_model_at_end would copy the sharded base: pass original_base, which returns "
            "the weights of its files by name"
        )
    return wrong
