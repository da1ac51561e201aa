"""Checks between the fields of a run's configuration, which no single field can make."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Final

from zofo.config.schema import AdapterConfig, RunConfig, has_own_rows, share_of
from zofo.disk.files import problem_of_name
from zofo.models.adapter_kinds import KINDS
from zofo.models.budget import problem_of_budget
from zofo.models.layers import problem_of_layers
from zofo.optim.methods import METHODS, anchor_problem, methods_that
from zofo.optim.options import STEP_KEYS, rank_one_problems

_NEED_ARGUMENTS: Final = (
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
)
"""Schedules of transformers that have arguments without defaults."""
_DATA: Final = ("train", "dev", "test", "data_dir")
PATHS: Final = {
    "model": ("name",),
    "task": _DATA,
    "adapter": ("config_file",),
    "reward": ("data",),
    "preference": ("data",),
    "watch_task": _DATA,
}
"""Section -> its options that may be paths."""


def check_sections(config: RunConfig) -> list[str]:
    """A message for each combination of fields that cannot work."""
    problems, method = _check_tasks(config), METHODS[config.method]
    full = not method.needs_adapter
    if full and "adapter" in config.model_fields_set and config.adapter.type != "none":
        problems.append(
            f"method {config.method} moves no adapter; remove adapter, or choose "
            f"{methods_that(lambda m: m.needs_adapter)}"
        )
    if not full and config.adapter.type == "none" and config.adapter.config_file is None:
        problems.append(
            f"method {config.method} moves an adapter and adapter.type is none; choose one, "
            f"such as lora or prompt, or method {methods_that(lambda m: not m.needs_adapter)}"
        )
    in_file = config.adapter.config_file is not None
    wrong = problem_of_layers(config.adapter.layers, config.adapter.type, in_file=in_file)
    problems += [] if wrong is None else [wrong]
    problems += _check_budget(config)
    is_prefix = config.adapter.type == "prefix" and config.adapter.config_file is None
    if method.base == "first" and config.model.quantization is not None:
        problems.append(
            f"method {config.method} moves every weight by its gradient, and model.quantization is "
            f"{config.model.quantization}, whose codes have none; leave it out, or choose "
            f"{methods_that(lambda m: m.base != 'first')}"
        )
    if config.gradient_checkpointing and is_prefix and not full:
        problems.append(
            "gradient_checkpointing is true and drops the cache that holds a prefix; set it to "
            "false, or choose another adapter"
        )
    if config.base_every > 1 and not method.first:
        problems.append(
            f"base_every is {config.base_every} and method {config.method} would train nothing in "
            "the other steps; leave it at 1, or choose method hybrid"
        )
    if config.base_batch_fraction < 1 and not method.first:
        problems.append(
            f"base_batch_fraction is {config.base_batch_fraction} and method {config.method} does "
            "not use the rest of the batch; lower batch_size, or choose method hybrid"
        )
    if config.base_batch_fraction < 1 and config.sampling == "shuffle-once":
        problems.append(
            f"base_batch_fraction is {config.base_batch_fraction} and sampling is shuffle-once, so "
            "the base would never see the last rows of a batch; choose sampling reshuffle"
        )
    problems += _check_paths(config) + _check_scores(config) + _check_reports(config)
    problems += _check_rewards(config) + _check_preference(config) + _check_own_rows(config)
    if config.zo_objective != "reward":  # which sets the directions of the rows itself
        problems += rank_one_problems(config)
    if config.directions_per_step != 1 and config.zo_objective == "f1":
        problems.append(
            f"directions_per_step is {config.directions_per_step!r} and zo_objective is f1, whose "
            "answers are written under one direction; set directions_per_step=1"
        )
    asked = [k for k in config.auto_keys if k in ("eps", f"{method.zeroth}_lr")]
    if asked and config.zo_objective != "loss":
        problems.append(
            f"{' and '.join(asked)} {'is' if len(asked) == 1 else 'are'} auto, which measures the "
            f"training loss, and zo_objective is {config.zo_objective}; give a number, or set "
            "zo_objective=loss"
        )
    if config.steps is not None and config.epochs is not None:
        problems.append("steps and epochs are both given; keep one")
    rates = config.base_lr if isinstance(config.base_lr, dict) else {"": config.base_lr}
    if not rates:
        problems.append("base_lr is an empty map; name the weights that move, or set base_lr=0")
    for pattern, rate in rates.items():
        if isinstance(rate, float) and rate < 0:
            name = f"base_lr[{pattern!r}]" if pattern else "base_lr"
            problems.append(f"{name} is {rate}; a learning rate is at least 0")
    numbers = [rate for rate in rates.values() if isinstance(rate, float)]
    if problem := anchor_problem(config.base_anchor, config.method, numbers):
        problems.append(problem)
    if config.base_anchor and method.base == "zeroth" and config.model.quantization is not None:
        problems.append(
            f"base_anchor is {config.base_anchor} and model.quantization "
            f"{config.model.quantization}, whose scales have no anchor; leave one of them out"
        )
    problems += _check_scheduler(config.scheduler)
    return problems


def _check_tasks(config: RunConfig) -> list[str]:
    """A message for each problem of the options of a task."""
    from zofo.tasks.load import check_spec, in_watch_task

    watched = config.watch_task
    found = [] if watched is None else check_spec(watched, only_dev=True)
    return [*check_spec(config.task), *map(in_watch_task, found)]


def _check_budget(config: RunConfig) -> list[str]:
    """A message for each reason why the adapter's modules cannot be chosen within a budget."""
    adapter, method = config.adapter, METHODS[config.method]
    if not method.needs_adapter:
        return []
    in_file = adapter.config_file is not None
    wrong = problem_of_budget(adapter.budget, adapter.modules, adapter.type, in_file=in_file)
    if wrong is None and adapter.budget and has_own_rows(config) and not method.first:
        wrong = (
            f"adapter.budget is {adapter.budget}, which measures the loss of examples, and method "
            f"{config.method} with zo_objective={config.zo_objective} reads none; leave it out"
        )
    return [] if wrong is None else [wrong]


def _check_rewards(config: RunConfig) -> list[str]:
    """A message for each contradiction between rewards and other options."""
    from zofo.rewards.functions import problem_of

    given, is_followed = config.reward.functions, config.zo_objective == "reward"
    if not given:
        wrong = "zo_objective is reward, and reward names none; give one, such as reward=json"
        return [wrong] if is_followed else []
    problems = [problem for problem in [problem_of(given)] if problem]
    if config.zo_objective == "preference":
        problems.append(
            "reward is given and zo_objective is preference, which has held-out rows of its own; "
            "leave reward out, or set another zo_objective"
        )
    if is_followed and (config.distribution == "gaussian" or config.num_directions > 1):
        problems.append(
            "zo_objective is reward, whose answers have a rank-one direction each; leave "
            "distribution and num_directions out"
        )
    if config.model.head not in ("auto", "causal-lm"):
        problems.append(
            f"reward is given and model.head is {config.model.head}; rewards need a decoder that "
            "writes text"
        )
    return problems


def _check_preference(config: RunConfig) -> list[str]:
    """A message for each contradiction between preference pairs and other options."""
    data, task = config.preference.data, config.task.name
    if config.zo_objective != "preference":
        wrong = (
            f"preference.data is given and zo_objective is {config.zo_objective}; set "
            "zo_objective=preference"
        )
        return [wrong] if data else []
    problems = []
    if data is None and task not in ("completion", "chat"):
        problems.append(
            f"zo_objective is preference and the rows of task {task} are no pairs; give the pairs "
            "as preference.data, or choose task completion or chat"
        )
    if config.model.head == "classification":
        problems.append(
            "zo_objective is preference and model.head is classification; the likelihood of an "
            "answer needs a decoder or an encoder-decoder"
        )
    return problems


def _check_own_rows(config: RunConfig) -> list[str]:
    """A message for each option that does not fit rows of the zeroth-order block's own."""
    if not has_own_rows(config):
        return []
    method, objective, problems = METHODS[config.method], config.zo_objective, []
    if not method.zeroth:
        problems.append(
            f"zo_objective is {objective} and method {config.method} has no zeroth-order block; "
            f"choose {methods_that(lambda m: bool(m.zeroth))}"
        )
    if config.base_batch_fraction < 1:
        problems.append(
            f"zo_objective is {objective}, which does not use the examples; leave "
            f"base_batch_fraction at 1, and set {objective}.batch_size"
        )
    if config.epochs is not None and not method.first:
        problems.append(
            f"epochs is {config.epochs:g}, which counts examples, and method {config.method} with "
            f"zo_objective={objective} reads none; give steps"
        )
    return problems


def _check_scheduler(scheduler: str) -> list[str]:
    """A message if the schedule is none of transformers, or one that needs arguments."""
    if scheduler == RunConfig.model_fields["scheduler"].default:
        return []  # Most configurations are then checked without the seconds of the import.
    from transformers import SchedulerType

    kinds = [str(kind.value) for kind in SchedulerType]
    known = [kind for kind in kinds if kind not in _NEED_ARGUMENTS]
    if scheduler in known:
        return []
    near = difflib.get_close_matches(scheduler, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    if scheduler in _NEED_ARGUMENTS:
        hint = (
            "it needs arguments, which only HybridArguments has (lr_scheduler_kwargs) and the "
            "configuration of a run does not; "
        )
    return [f"scheduler is {scheduler!r}; {hint}choose one of {', '.join(known)}"]


def _check_paths(config: RunConfig) -> list[str]:
    """A message for each option that names a file or a folder that cannot exist."""
    named = {"output_dir": config.output_dir}
    for section, keys in PATHS.items():
        values = getattr(config, section)
        named |= {f"{section}.{key}": getattr(values, key, None) for key in keys}
    problems = {k: problem_of_name(Path(path)) for k, path in named.items() if path}
    return [f"{key}: {problem}" for key, problem in problems.items() if problem]


def _check_scores(config: RunConfig) -> list[str]:
    """A message for each objective or score that the task does not have."""
    from zofo.tasks.load import writes_answers, writes_text

    problems = []
    name = config.task.name
    asked = [key for key in ("zo_objective", "select_by") if getattr(config, key) == "f1"]
    if asked and not writes_answers(config.task):
        remedy = "set task.metric=f1" if name == "completion" else "choose accuracy"
        problems.append(f"{' and '.join(asked)} is f1 and task {name} scores no answers; {remedy}")
    if config.zo_objective == "accuracy" and writes_text(config.task):
        remedy = "f1" if writes_answers(config.task) else "loss"
        problems.append(
            f"zo_objective is accuracy and task {name} has no candidates to choose from; choose "
            f"{remedy}"
        )
    return problems


def _check_reports(config: RunConfig) -> list[str]:
    """A message for each name in `report_to` that Trainer does not know or lacks the package of."""
    asked = set(config.report_to) - {"none", "all"}
    if not asked:
        return []
    from transformers.integrations import integration_utils

    known = integration_utils.INTEGRATION_TO_CALLBACK
    ready = integration_utils.get_available_reporting_integrations()
    problems = []
    for name in sorted(asked - {*ready}):
        if name in known:
            problems.append(
                f"report_to names {name}, whose package is not installed; install it, or leave "
                "the name out"
            )
        else:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            problems.append(
                f"report_to names {name!r}; {hint}choose from {', '.join(sorted(known))}"
            )
    return problems


def idle_options(config: RunConfig) -> list[str]:
    """A message for each changed option without an effect with this method and adapter."""
    method, idle = METHODS[config.method], []
    for block in ("base", "adapter"):
        if getattr(method, block) == "frozen":
            idle += [f"{block}_lr", f"{block}_weight_decay"]
    if not method.zeroth:
        idle += [*STEP_KEYS, "base_batch_fraction", "zo_objective"]
    if not method.first:
        idle += ["optimizer", "max_grad_norm"]
    if method.base != "zeroth" or not method.needs_adapter:
        idle.append("snapshot_every")
    if method.base == "frozen":
        idle.append("base_anchor")
    found = [
        f"{key} has no effect with method {config.method}"
        for key in idle
        if getattr(config, key) != RunConfig.model_fields[key].default
    ]
    if method.zeroth and method.first and config.base_batch_fraction < 1 and share_of(config) == 1:
        found.append(f"base_batch_fraction has no effect with batch_size {config.batch_size}")
    return found + _idle_adapter_options(config.adapter)


def _idle_adapter_options(adapter: AdapterConfig) -> list[str]:
    used, choice = {"config_file", "modules"}, "adapter.config_file"
    if adapter.config_file is None:
        taken = KINDS[adapter.type].options if adapter.type in KINDS else ()
        used, choice = {"type", *used, *taken}, f"adapter {adapter.type}"
    found = [
        f"adapter.{key} has no effect with {choice}"
        for key, field in AdapterConfig.model_fields.items()
        if key not in used and getattr(adapter, key) != field.default
    ]
    unused = adapter.budget is None and "budget_batches" in used
    if unused and adapter.budget_batches != AdapterConfig.model_fields["budget_batches"].default:
        found.append("adapter.budget_batches has no effect without adapter.budget")
    return found
