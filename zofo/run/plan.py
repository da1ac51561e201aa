"""The plan of a run: parameters by block, memory and cost, computed without weights.

The sizes of weights, gradients and optimizer states are exact. The scratch memory is that of the
largest layer. Activations follow Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models" (2022), without attention matrices: 34 · batch · length · hidden bytes per layer
if a value has two bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from zofo.config.schema import AUTO, RunConfig
from zofo.environment import resolve_device
from zofo.models.layers import backward_share
from zofo.models.quantized import num_weights, quantized_bytes
from zofo.optim.cost import num_moves
from zofo.optim.estimator import forwards_per_direction
from zofo.optim.methods import METHODS, apply_method, param_groups
from zofo.perturb.quantized import unnest_scales
from zofo.perturb.view import Perturbation
from zofo.run.cost import forward_equivalents
from zofo.run.pairs import PairRows
from zofo.run.prepare import num_steps
from zofo.run.rewards import has_rewards, reward_options, reward_rows
from zofo.saved.source import base_of
from zofo.scoring.watched import encode_watched, read_watched
from zofo.tasks.encode import Encoded, encoder_for
from zofo.tasks.encode_rows import encode_parts
from zofo.tasks.load import load_splits
from zofo.tasks.spec import Splits
from zofo.trainer.answers import RewardSource, bytes_of_answer
from zofo.trainer.pairs import PairSource

_ACTIVATION_BYTES = 34 / 2  # bytes that a layer keeps per hidden value, over the bytes of a value


@dataclass(frozen=True)
class Plan:
    """The sizes and the cost of a run."""

    steps: int  # optimizer steps
    forward_equivalents: float  # cost of training without evaluations, at most
    num_parameters: dict[str, tuple[str, int, int]]  # block -> (order, trained ones, all)
    memory_bytes: dict[str, int]  # kind of memory -> bytes
    num_rows: dict[str, int]  # part of the data -> rows
    max_tokens: int  # tokens of the longest sequence
    notes: tuple[str, ...]  # changes to the rows, and values to be measured


def make_plan(config: RunConfig) -> Plan:
    """Read the data, build the model without weights, and count.

    Raises:
        UserError: for anything that a run would refuse.
    """
    tokenizer = config.model.tokenizer()
    splits = load_splits(config.task, seed=config.seed, tokenizer=tokenizer)
    base = base_of(config, splits)
    encoder = encoder_for(tokenizer, base.head, config.task)
    model: Any = base.empty()
    config_of_model = model.config
    if METHODS[config.method].base == "zeroth":
        unnest_scales(model)
    if METHODS[config.method].needs_adapter:
        model = config.adapter.build(model, base.head, tokenizer)
    rows, notes = encode_parts(
        encoder, splits, model, may_be_empty=() if config.measure_test else ("test",)
    )
    steps = num_steps(config, len(rows["train"]))
    if config.watch_task is not None:
        second, seed = config.watch_task, config.seed
        read = read_watched(second, base, splits.labels, seed=seed, tokenizer=tokenizer)
        watched = encode_watched(second, read, base, tokenizer, model, batch_size=1)
        rows["watch_task"] = [*watched.rows]
        scored = f"watch_task {second.name} is scored before training and at each evaluation"
        notes = (*notes, *watched.notes, scored)
    prompts = _prompts(config, splits, tokenizer, model)
    pairs = _pairs(config, splits, tokenizer, base.head, model)
    answers = _cost_of_answers(config, rows["train"], prompts)
    if pairs is not None:
        answers = _cost_of_pairs(config, rows["train"], pairs)
        notes = (*notes, *pairs.notes, _of_reference(config, steps, rows["train"], pairs))
    again = config.model.dtype != "float32" or _has_dropout(model, config_of_model)
    return Plan(
        steps=steps,
        forward_equivalents=forward_equivalents(
            config, steps, part_again=again, cost_of_answers=answers
        ),
        num_parameters=_parameters(model, config),
        memory_bytes=_memory(model, config, config_of_model, rows["train"])
        | _memory_of_answers(model, config, prompts),
        num_rows={part: len(encoded) for part, encoded in rows.items()},
        max_tokens=max(row.length for part in rows.values() for row in part),
        notes=(*splits.notes, *notes, *_of_auto(config, len(rows["train"]))),
    )


def _of_auto(config: RunConfig, num_rows: int) -> list[str]:
    """A note on the values that are measured before the run."""
    asked = config.auto_keys
    if not asked:
        return []
    from zofo.advice.advise import most_forwards
    from zofo.run.auto import setting_of

    most = most_forwards(setting_of(config, num_rows))
    what = f"measured before the run, for at most {most} forward-equivalents more"
    return [f"{', '.join(asked)}: {what}; zofo advise shows them"]


def _prompts(config: RunConfig, splits: Splits, tokenizer: Any, model: Any) -> list[int]:
    """The numbers of tokens of the prompts that rewards need; empty without rewards."""
    if not has_rewards(config):
        return []
    rows, _ = reward_rows(config, splits)
    functions: Any = config.reward.functions
    source = RewardSource(rows, functions, tokenizer, reward_options(config))
    source.check(model)
    return [len(ids) for ids in source.ids]


def _pairs(
    config: RunConfig, splits: Splits, tokenizer: Any, head: str, model: Any
) -> PairSource | None:
    """The preference pairs of the run, which the model can read."""
    if config.zo_objective != "preference":
        return None
    source = PairRows(config, splits, tokenizer, head).source
    source.check(model)
    return source


def _unit(config: RunConfig, train: Sequence[Encoded], pairs: PairSource) -> float:
    """Pairs whose tokens are those of one forward-equivalent."""
    if not METHODS[config.method].first:
        return config.preference.batch_size
    length = sum(row.length for row in train) / len(train)
    return config.batch_size * length / pairs.mean_tokens


def _cost_of_pairs(config: RunConfig, train: Sequence[Encoded], pairs: PairSource) -> float:
    """Cost of all evaluations of a micro-batch of pairs, in forward passes over the rows."""
    evaluations = config.num_directions * forwards_per_direction(config.estimator)
    evaluations += config.estimator == "forward" or config.directions_per_step != 1
    return evaluations * config.preference.batch_size / _unit(config, train, pairs)


def _of_reference(
    config: RunConfig, steps: int, train: Sequence[Encoded], pairs: PairSource
) -> str:
    """A note on the pairs that are evaluated once before the first step."""
    num = len(pairs.used(num_moves(steps, config.base_every) * config.accumulation))
    cost = num / _unit(config, train, pairs)
    return (
        f"reference: {num} preference pairs are evaluated once before the first step, for "
        f"{cost:,.1f} forward-equivalents more"
    )


def _memory_of_answers(model: Any, config: RunConfig, prompts: Sequence[int]) -> dict[str, int]:
    """Memory of the answers that are written together."""
    if not prompts:
        return {}
    chosen = config.reward
    one = bytes_of_answer(model, max(prompts) + chosen.max_new_tokens)
    most = max(one, int(chosen.memory_gib * 2**30))
    return {"answers": min(most, one * chosen.num_answers * chosen.batch_size)}


def _cost_of_answers(config: RunConfig, train: Sequence[Encoded], prompts: Sequence[int]) -> float:
    """Cost of generating the longest answers, in forward passes over the rows."""
    if prompts:
        chosen, mean = config.reward, sum(prompts) / len(prompts)
        sides = forwards_per_direction(config.estimator)
        answers = chosen.batch_size * chosen.num_answers * sides
        length = sum(row.length for row in train) / len(train)
        has_examples = bool(METHODS[config.method].first)
        unit = config.batch_size * length if has_examples else chosen.batch_size * mean
        return answers * (mean + chosen.max_new_tokens - 1) / unit
    if config.zo_objective != "f1":
        return 1.0
    # The last token of an answer is not fed back into the model.
    written = sum(len(row.prompt) + config.task.max_new_tokens - 1 for row in train)
    return written / sum(row.length for row in train)


def _has_dropout(model: nn.Module, model_config: Any) -> bool:
    # Attention takes its rate from the configuration and has no module for it.
    rates = [rate for key, rate in vars(model_config).items() if "drop" in key]
    rates += [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _parameters(model: nn.Module, config: RunConfig) -> dict[str, tuple[str, int, int]]:
    blocks, method = apply_method(model, config.method), METHODS[config.method]
    groups = _groups(model, config)
    counts = {}
    for block, parameters in (("base", blocks.base), ("adapter", blocks.adapter)):
        moved = sum(p.numel() for g in groups if g["block"] == block for p in g["params"])
        total = num_weights(model, parameters.values())
        counts[block] = (str(getattr(method, block)), moved, total)
    return counts


def _groups(model: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    return param_groups(
        model,
        config.method,
        base_lr=0.0 if config.base_lr in (None, AUTO) else config.base_lr,  # type: ignore[arg-type]
        adapter_lr=0.0 if config.adapter_lr in (None, AUTO) else config.adapter_lr,  # type: ignore[arg-type]
    )


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _memory(
    model: nn.Module, config: RunConfig, model_config: Any, train: Sequence[Encoded]
) -> dict[str, int]:
    groups = _groups(model, config)
    first = [p for g in groups if g["order"] == "first" for p in g["params"]]
    zeroth = [g for g in groups if g["order"] == "zeroth"]
    states = 2 if config.optimizer == "adamw" else 0  # AdamW keeps two moments per parameter.
    scratch = 0
    if zeroth:
        view = Perturbation(
            model,
            [p for g in zeroth for p in g["params"]],
            [t for g in zeroth for t in g["tensors"]],
            seed=0,
            distribution=config.distribution,
            overlap=config.overlap and resolve_device(config.device) == "cuda",
        )
        scratch = view.largest_layer_bytes
    longest = sorted((row.length * len(row.rows) for row in train), reverse=True)
    tokens = sum(longest[: config.batch_size])
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else None
    hidden = getattr(text, "hidden_size", 0)
    layers = getattr(text, "num_hidden_layers", 0)
    if getattr(text, "is_encoder_decoder", False):
        layers += getattr(text, "num_decoder_layers", getattr(text, "decoder_layers", layers)) or 0
    value = next(p for p in model.parameters() if p.is_floating_point()).element_size()
    # Activations are held from the lowest layer that the backward pass reaches. Without such a
    # pass, or if it recomputes them, only one layer's are held.
    reached = round(layers * backward_share(model)) if first else 0
    kept = 1 if config.gradient_checkpointing else max(reached, 1)
    return {
        **_weights(model),
        "gradients": _bytes(first),
        "optimizer states": states * _bytes(first),
        "perturbation scratch": scratch,
        "activations (estimate)": int(_ACTIVATION_BYTES * value * tokens * hidden * kept),
    }


def _weights(model: nn.Module) -> dict[str, int]:
    """Bytes of the weights; of a quantised base its codes, its scales and the other weights."""
    total, parts = _bytes(list(model.parameters())), quantized_bytes(model)
    if not parts.codes:
        return {"weights": total}
    return {
        "codes of the quantised layers": parts.codes,
        "scales of the quantised layers": parts.scales,
        "other weights": total - parts.codes,
    }
