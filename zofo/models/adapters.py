"""Adapters of `peft`, by name or from any configuration file.

The initial values of prompts and prefixes follow the paper (`zofo.models.initial_values`). So do
the defaults of LoRA: r 8 and alpha 16, on query and value.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from zofo.console import quiet
from zofo.disk.files import fingerprint, refusing
from zofo.errors import UserError
from zofo.models.adapter_files import config_from_file
from zofo.models.adapter_kinds import ADAPTER_TYPES, KINDS
from zofo.models.fitting import new_modules
from zofo.models.initial_values import set_initial_values, takes
from zofo.models.layers import ALL, Layers, chosen_layers, problem_of_layers
from zofo.models.limits import limited_memory
from zofo.models.loading import Head
from zofo.models.quantized import check_dora
from zofo.optim.blocks import check_adapter_config, split_parameters

_TASK_TYPES: Final = {
    "causal-lm": "CAUSAL_LM",
    "classification": "SEQ_CLS",
    "seq2seq": "SEQ_2_SEQ_LM",
}
_PAPERS_TARGETS: Final = {  # for architectures that peft does not know
    "lora": ("q_proj", "v_proj"),  # as in the paper
    "ia3": ("k_proj", "v_proj", "down_proj"),  # as peft chooses for Llama
}


def create_adapter(
    model: nn.Module,
    type: str = "lora",
    *,
    head: Head = "causal-lm",
    tokenizer: Any = None,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: str | Sequence[str] | None = None,
    layers: Layers = ALL,
    num_virtual_tokens: int | None = None,
    init_text: str | None = None,
    config_file: str | Path | None = None,
    seed: int = 0,
) -> nn.Module:
    """Attach an adapter to a model.

    Args:
        model: the base. Adapters such as LoRA change it in place.
        type: a name in `zofo.models.adapter_kinds.KINDS`; ignored if `config_file` is given.
        head: the head of the model.
        tokenizer: the tokenizer of the model, which `init_text` needs.
        r: rank of LoRA, DoRA and rsLoRA.
        alpha: the scale of LoRA and DoRA is alpha / r, that of rsLoRA is alpha / sqrt(r).
        dropout: dropout on the input of LoRA, DoRA and rsLoRA.
        targets: the modules that LoRA, DoRA, rsLoRA and IA3 adapt: ends of module names,
            "all-linear", or None for peft's choice for this architecture. Each must match at least
            one linear module.
        layers: the layers in which they do so: "all", "last 4", "first 4", or numbers from 0.
        num_virtual_tokens: length of prefix (default 5), prompt or p-tuning (default 10).
        init_text: text whose tokens (prompt) or activations (prefix) are the initial values;
            default: random tokens of the vocabulary.
        config_file: a JSON or YAML file of a `peft.PeftConfig` with its `peft_type`.
        seed: seed of the initial values. Global generators keep their state.

    Raises:
        UserError: for an unknown type, a target that matches nothing, an unreadable file, or an
            adapter that peft cannot attach to this model or run on it; for layers that the model
            or the type does not have.
    """
    import peft

    problem = problem_of_layers(layers, type, in_file=config_file is not None)
    if problem is not None:
        raise UserError(problem)
    task = peft.TaskType(_TASK_TYPES[head])
    num = num_virtual_tokens or getattr(KINDS.get(type), "num_virtual_tokens", None) or 0
    if config_file is not None:
        config = config_from_file(Path(config_file), str(task.value), model)
        check_adapter_config(config)
        with refusing(
            f"the target_modules of the adapter file {config_file} are wrong", "correct them"
        ):
            _check_targets(model, getattr(config, "target_modules", None) or "all-linear")
    elif type in ("lora", "dora", "rslora"):
        resolved = _within(model, _targets(model, targets), layers)
        config = _lora_config(
            model, type, task, resolved, r=r, lora_alpha=_plain(alpha), lora_dropout=dropout
        )
    elif type == "ia3":
        config = _ia3_config(model, task, _within(model, _targets(model, targets, "ia3"), layers))
    elif type in KINDS:
        config = _prompt_config(model, type, task, num)
    else:
        raise UserError(f"adapter type is {type!r}; choose one of {', '.join(ADAPTER_TYPES)}")
    if getattr(config, "is_prompt_learning", False):
        _require_cache(model, config)
    if getattr(config, "use_dora", False):
        check_dora(model)
    # By itself, peft trains only these two modules of a new head and freezes the rest at random.
    fresh = [name for name in new_modules(model) if name not in ("classifier", "score")]
    if fresh:
        config.modules_to_save = [*(getattr(config, "modules_to_save", None) or ()), *fresh]

    # Only a file can ask for initial values that change the base.
    before = _digests(model) if config_file is not None else {}
    problem = f"peft cannot attach {_kind_of(config)} to {model.__class__.__name__}"
    with torch.random.fork_rng(), quiet(), refusing(problem, "choose another, such as lora"):
        torch.manual_seed(seed)
        with limited_memory(model, f"the adapter {_kind_of(config)}"):
            adapted = peft.get_peft_model(model, config)
        if config_file is None and type in ("prefix", "prompt"):
            set_initial_values(adapted, type, num, tokenizer=tokenizer, init_text=init_text)
        if config.is_prompt_learning or config_file is not None:
            _try_out(adapted)
    if before:
        _check_unchanged(adapted, before, config_file)
    return adapted


def _digests(model: nn.Module) -> dict[str, str]:
    """Name -> digest of each base weight that is not on the meta device."""
    base = split_parameters(model).base
    return {n: fingerprint({n: p}) for n, p in base.items() if p.device.type != "meta"}


def _check_unchanged(
    adapted: nn.Module, before: dict[str, str], config_file: str | Path | None
) -> None:
    """Refuse an adapter whose initial values changed the base, as those of PiSSA do."""
    after = _digests(adapted)
    changed = [name for name in before if after.get(name, before[name]) != before[name]]
    if changed:
        raise UserError(
            f"peft changes {len(changed)} weights of the base when it makes the adapter of "
            f"{config_file}, such as {changed[0]}, so a saved adapter would not fit the original "
            "base; choose initial values that leave it as it is"
        )


def _kind_of(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _lora_config(model: nn.Module, type: str, task: Any, targets: Any, **values: Any) -> Any:
    import peft

    return peft.LoraConfig(
        task_type=task,
        target_modules=targets,
        fan_in_fan_out=_are_transposed(model, targets),
        use_dora=type == "dora",
        use_rslora=type == "rslora",
        **values,
    )


def _plain(number: float) -> float:
    """A whole number as an integer, so that 16 and 16.0 give the same file."""
    return int(number) if number == int(number) else number


def _ia3_config(model: nn.Module, task: Any, targets: Any) -> Any:
    import peft

    return peft.IA3Config(
        task_type=task,
        target_modules=targets,
        feedforward_modules=_feedforward_of(model, targets),
        fan_in_fan_out=_are_transposed(model, targets),
    )


def _prompt_config(model: nn.Module, type: str, task: Any, num: int) -> Any:
    """The configuration of prefix, prompt or p-tuning, with sizes read from the model."""
    import peft

    config: Any = model.config
    is_pair = bool(getattr(config, "is_encoder_decoder", False))
    values: dict[str, Any] = {"task_type": task, "num_virtual_tokens": num}
    if type != "prefix":
        values["token_dim"] = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
        if is_pair:
            # By default, peft makes a second prompt for the decoder and does not use it.
            values["num_transformer_submodules"] = 1
        return (peft.PromptTuningConfig if type == "prompt" else peft.PromptEncoderConfig)(**values)
    if is_pair:
        values["num_layers"] = _first(config, "num_decoder_layers", "decoder_layers")
        heads = _first(config, "decoder_attention_heads", "num_heads", "num_attention_heads")
        values["num_attention_heads"] = heads
        if hasattr(config, "d_kv"):  # The heads of T5 need not add up to the hidden size.
            values["token_dim"] = heads * config.d_kv
    return peft.PrefixTuningConfig(**values)


def _first(config: Any, *names: str) -> Any:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if value is not None), None)


def _require_cache(model: Any, config: Any) -> None:
    """Refuse a prefix for a model that takes no cache, before the prefix is attached."""
    if _kind_of(config) != "PREFIX_TUNING":
        return
    if not takes(model, "past_key_values") and not takes(model.base_model, "past_key_values"):
        raise UserError(
            f"{model.__class__.__name__} takes no keys and values from outside, so it can have no "
            "prefix; choose adapter prompt, p-tuning or lora"
        )


@torch.no_grad()
def _try_out(model: Any) -> None:
    """Run one forward pass of one token, because some limits of peft show only there."""
    base = model.get_base_model()
    embeddings = base.get_input_embeddings().weight
    # bitsandbytes packs 4-bit weights irreversibly when they are evaluated without gradients.
    if embeddings.device.type == "meta" or getattr(base, "is_quantized", False):
        return
    ids = torch.ones((1, 1), dtype=torch.long, device=embeddings.device)  # [rows, tokens]
    inputs = {"input_ids": ids, "attention_mask": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    was_training = model.training
    model.eval()
    try:
        model(**inputs)
    finally:
        model.train(was_training)


def _linear_names(model: nn.Module) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, Conv1D)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def _matches(name: str, target: str) -> bool:
    """Whether a module name matches a target, by peft's rule for lists of names."""
    return name == target or name.endswith(f".{target}")


def _targets(model: nn.Module, targets: str | Sequence[str] | None, kind: str = "lora") -> Any:
    """The targets in peft's form: a list of names, a pattern, or "all-linear"."""
    if targets is None:
        known = _pefts_targets(model, kind)
        if isinstance(known, str):  # a pattern
            _check_targets(model, known)
            return known
        targets = list(known)
    if targets == "all-linear":
        return targets
    chosen = [targets] if isinstance(targets, str) else list(targets)
    if not chosen:
        raise UserError("the adapter's targets are empty; leave them out for the default")
    _check_targets(model, chosen)
    return chosen


def _within(model: nn.Module, targets: Any, layers: Layers) -> Any:
    """The modules of the chosen layers that targets match, by their whole names."""
    if layers == ALL:
        return targets
    from transformers.pytorch_utils import Conv1D

    chosen = tuple(f"{name}." for name in chosen_layers(model, layers))
    names = [name for name in _linear_names(model) if name.startswith(chosen)]
    if targets == "all-linear":
        kinds = (nn.Linear, Conv1D)
        return [name for name in names if isinstance(model.get_submodule(name), kinds)]
    matched: dict[str, list[str]] = (
        {targets: [name for name in names if re.fullmatch(targets, name)]}
        if isinstance(targets, str)
        else {t: [name for name in names if _matches(name, t)] for t in targets}
    )
    unmatched = [target for target, found in matched.items() if not found]
    if unmatched:
        raise UserError(
            f"adapter target {', '.join(map(repr, unmatched))} matches no linear module in the "
            f"layers {layers}; choose other layers or targets"
        )
    every = {name for found in matched.values() for name in found}
    return [name for name in names if name in every]


def _pefts_targets(model: nn.Module, kind: str) -> Any:
    """Peft's targets for the architecture, or else `_PAPERS_TARGETS` if the model has them."""
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as IA3
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA

    model_type = getattr(getattr(model, "config", None), "model_type", "")
    known = (IA3 if kind == "ia3" else LORA).get(model_type)
    if known is not None:
        return known
    ends = {name.rsplit(".", 1)[-1] for name in _linear_names(model)}
    if ends.issuperset(_PAPERS_TARGETS[kind]):
        return _PAPERS_TARGETS[kind]
    raise UserError(
        f"peft knows no {kind} targets for models of type {model_type!r}; set the adapter's "
        f"targets to some of {', '.join(sorted(ends))}, or to all-linear"
    )


def _feedforward_of(model: nn.Module, targets: Any) -> list[str]:
    """The targets whose input IA3 scales instead of their output."""
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as KNOWN

    model_type = getattr(getattr(model, "config", None), "model_type", "")
    inner = KNOWN.get(model_type, ("down_proj",))
    if isinstance(targets, str):
        return list(inner)
    return [t for t in targets if any(t == name or t.endswith(f".{name}") for name in inner)]


def _check_targets(model: nn.Module, targets: str | Sequence[str]) -> None:
    if targets == "all-linear":
        return
    names = _linear_names(model)
    if isinstance(targets, str):
        unmatched = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
    else:
        unmatched = [t for t in targets if not any(_matches(name, t) for name in names)]
    if unmatched:
        ends = sorted({name.rsplit(".", 1)[-1] for name in names})
        raise UserError(
            f"adapter target {', '.join(map(repr, sorted(unmatched)))} matches no linear module of "
            f"{model.__class__.__name__}; its modules are {', '.join(ends)}"
        )


def _are_transposed(model: nn.Module, targets: Any) -> bool:
    """Whether the targets store weights as [in, out], as the Conv1D of GPT-2 does."""
    from transformers.pytorch_utils import Conv1D

    if targets == "all-linear":
        return any(isinstance(module, Conv1D) for module in model.modules())
    return any(
        isinstance(module, Conv1D) and any(_matches(name, t) for t in targets)
        for name, module in model.named_modules()
    )
