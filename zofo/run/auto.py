"""Replace every `auto` of a run's configuration by a measured number.

`run.yaml` holds the numbers, so that resuming and replaying measure nothing. `advise.json` holds
the measurements behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from zofo.advice.advise import advise
from zofo.advice.setting import Advice, Caps, Setting
from zofo.config.schema import AUTO, AUTO_KEYS, FIRST_ORDER_BASE_LR, RunConfig, share_of
from zofo.environment import resolve_device
from zofo.errors import UserError
from zofo.models.adapter_kinds import KINDS
from zofo.optim.methods import METHODS
from zofo.optim.options import step_values
from zofo.run.cost import backward_share_of
from zofo.run.prepare import Prepared, num_steps
from zofo.tasks.losses import losses_and_errors


def setting_of(
    config: RunConfig, num_rows: int, *, caps: Caps = "ignore", target: float | None = None
) -> Setting:
    """The advisor's setting for a run on `num_rows` training rows; see `advise_on`."""
    kind = KINDS.get(config.adapter.type, KINDS["lora"])
    is_full = METHODS[config.method].base == "first"
    share = share_of(config)
    return Setting(
        **step_values(config),
        method=config.method,
        num_steps=num_steps(config, num_rows),
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        base_rows=None if share == 1 else round(share * config.batch_size),
        optimizer=config.optimizer,
        adapter_weight_decay=config.adapter_weight_decay,
        max_grad_norm=config.max_grad_norm,
        base_lr=config.base_lr,
        adapter_lr=config.adapter_lr,
        usual_rate=FIRST_ORDER_BASE_LR if is_full else kind.lr,
        backward_share=backward_share_of(config),
        seed=config.seed,
        caps=caps,
        target=target,
    )


def advise_on(
    config: RunConfig,
    prepared: Prepared,
    *,
    caps: Caps = "ignore",
    target: float | None = None,
    split: bool = True,
    report: Callable[[str, float], None] | None = None,
) -> Advice:
    """The advice on a run.

    Args:
        config: the configuration with `auto` values.
        prepared: its model and rows. The model moves to the run's device; its weights stay equal.
        caps: whether the theorem's upper limits lower the rates.
        target: ε of the theorem, a norm of the gradient.
        split: whether to measure one rate for each group of modules.
        report: called with each stage that begins and the forward-equivalents so far.

    Raises:
        UserError: if the objective has no rows of its own, or there are too few.
    """
    device = resolve_device(config.device)
    prepared.model.to(device)
    rows = prepared.rows["train"]

    def batch_of(indices: Any) -> dict[str, Tensor]:
        batch = prepared.collator([rows[i] for i in indices])
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        value, shares, _ = losses_and_errors(model, batch, config.task.objective)
        return value, shares.detach()

    setting = setting_of(config, len(rows), caps=caps, target=target)
    return advise(prepared.model, loss, batch_of, len(rows), setting, split=split, report=report)


def resolve(
    config: RunConfig,
    prepared: Prepared,
    *,
    report: Callable[[str, float], None] | None = None,
) -> tuple[RunConfig, Advice | None]:
    """The configuration with numbers in place of `auto`, and the advice if one was measured."""
    asked = config.auto_keys
    advice = advise_on(config, prepared, report=report) if asked else None
    update: dict[str, Any] = {}
    for key in AUTO_KEYS:
        if getattr(config, key) != AUTO:
            continue
        if key in asked:
            update[key] = getattr(advice, key)
            if update[key] is None:
                raise UserError(f"{key} could not be found; give it as a number")
        else:  # The method does not use this value, and `auto` is no number.
            update[key] = RunConfig.model_fields[key].default
    return config.model_copy(update=update), advice
