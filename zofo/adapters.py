"""PEFT adapters: LoRA, prefix and prompt tuning, or any configuration of `peft` from a file.

Initial values follow the paper where peft's do not: a prefix from real activations, a prompt from
real tokens (arXiv 2604.09940, experimental setup). LoRA: r 8, alpha 16, as there.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
from torch import nn

from zofo.errors import UserError
from zofo.files import refusing
from zofo.models import Head, quiet

AdapterType = Literal["lora", "prefix", "prompt", "none"]
ADAPTER_TYPES: Final[tuple[str, ...]] = get_args(AdapterType)
DEFAULT_NUM_VIRTUAL_TOKENS: Final = {"prefix": 5, "prompt": 10}
"""The paper's numbers."""


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
    num_virtual_tokens: int | None = None,
    init_text: str | None = None,
    config_file: str | Path | None = None,
    seed: int = 0,
) -> nn.Module:
    """Attach an adapter.

    Args:
        model: the base; changed in place by tuners such as LoRA.
        type: "lora", "prefix" or "prompt"; ignored when `config_file` is given.
        head: the head of the model.
        tokenizer: for `init_text`.
        r: rank of LoRA.
        alpha: LoRA's scale is alpha / r.
        dropout: on LoRA's input.
        targets: names of the modules that get LoRA: ends of module names, "all-linear", or None
            for peft's choice for this architecture. Each must match at least one linear module.
        num_virtual_tokens: length of prefix (default 5) or prompt (default 10).
        init_text: text whose tokens (prompt) or activations (prefix) are the initial values;
            default: tokens drawn from the vocabulary by `seed`.
        config_file: JSON or YAML of a `peft.PeftConfig`, with its `peft_type`.
        seed: of the initial values; global generators are left alone.

    Raises:
        UserError: for an unknown type, a target that matches nothing, an unreadable file, or an
            adapter that peft cannot attach to this model.
    """
    import peft

    task = peft.TaskType.SEQ_CLS if head == "classification" else peft.TaskType.CAUSAL_LM
    if config_file is not None:
        config = _config_from_file(Path(config_file), task)
        if getattr(config, "target_modules", None):
            _check_targets(model, config.target_modules)
    elif type == "lora":
        resolved = _lora_targets(model, targets)
        config = peft.LoraConfig(
            task_type=task,
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=resolved,
            fan_in_fan_out=_are_transposed(model, resolved),
        )
    elif type in DEFAULT_NUM_VIRTUAL_TOKENS:
        num = num_virtual_tokens or DEFAULT_NUM_VIRTUAL_TOKENS[type]
        kind = peft.PrefixTuningConfig if type == "prefix" else peft.PromptTuningConfig
        config = kind(task_type=task, num_virtual_tokens=num)
    else:
        raise UserError(f"adapter type is {type!r}; choose one of {', '.join(ADAPTER_TYPES)}")

    with torch.random.fork_rng(), quiet():
        torch.manual_seed(seed)
        try:
            adapted = peft.get_peft_model(model, config)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f"peft cannot attach {config.peft_type} to {model.__class__.__name__}: {error}"
            ) from error
        if config_file is None and type in DEFAULT_NUM_VIRTUAL_TOKENS:
            _initialise(adapted, type, num, tokenizer, init_text)
    return adapted


def _initialise(
    model: Any,
    type: str,
    num: int,
    tokenizer: Any,
    init_text: str | None,
) -> None:
    """Real tokens for a prompt, real activations for a prefix."""
    import peft

    base = model.get_base_model()
    embeddings = base.get_input_embeddings().weight
    if embeddings.device.type == "meta":
        return
    if init_text is not None:
        if tokenizer is None:
            raise UserError("init_text needs a tokenizer")
        found = tokenizer(init_text, add_special_tokens=False)["input_ids"]
        if not found:
            raise UserError("init_text holds no token; give some words")
        ids = torch.tensor((found * (num // len(found) + 1))[:num])
    else:
        ids = torch.randint(embeddings.shape[0], (num,))
    ids = ids.to(embeddings.device)
    encoder = model.prompt_encoder[model.active_adapter]
    if type == "prompt":
        with torch.no_grad():
            encoder.embedding.weight.copy_(embeddings[ids])
        return
    with torch.no_grad(), _eval_mode(base):
        try:
            outputs = base(input_ids=ids[None], use_cache=True)
        except TypeError:  # encoders keep no keys and values: peft's random values stay
            return
    cache = getattr(outputs, "past_key_values", None)
    if cache is not None:
        peft.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)


class _eval_mode:  # noqa: N801
    def __init__(self, model: nn.Module) -> None:
        self.model, self.was_training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *exception: object) -> None:
        self.model.train(self.was_training)


def _linear_names(model: nn.Module) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, Conv1D)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def _matches(name: str, target: str) -> bool:
    """Peft's rule for lists of names."""
    return name == target or name.endswith(f".{target}")


def _lora_targets(model: nn.Module, targets: str | Sequence[str] | None) -> Any:
    if targets is None:
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

        model_type = getattr(getattr(model, "config", None), "model_type", "")
        if model_type not in KNOWN:
            ends = sorted({n.rsplit(".", 1)[-1] for n in _linear_names(model)})
            raise UserError(
                f"peft knows no LoRA targets for models of type {model_type!r}; set the adapter's "
                f"targets to some of {', '.join(ends)}, or to all-linear"
            )
        targets = list(KNOWN[model_type])
    if targets == "all-linear":
        return targets
    chosen = [targets] if isinstance(targets, str) else list(targets)
    if not chosen:
        raise UserError("the adapter's targets are empty; leave them out for the default")
    _check_targets(model, chosen)
    return chosen


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
    """GPT-2's Conv1D stores weights as [in, out]."""
    from transformers.pytorch_utils import Conv1D

    if targets == "all-linear":
        return any(isinstance(module, Conv1D) for module in model.modules())
    return any(
        isinstance(module, Conv1D) and any(_matches(name, t) for t in targets)
        for name, module in model.named_modules()
    )


def _config_from_file(path: Path, task: Any) -> Any:
    import yaml
    from peft import get_peft_config

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"the adapter file {path} cannot be read: {error.strerror}") from error
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"the adapter file {path} is not valid {path.suffix[1:]}: {error}"
        ) from error
    if not isinstance(values, dict) or "peft_type" not in values:
        raise UserError(
            f"the adapter file {path} has no peft_type; it must be a peft configuration, such as "
            '{"peft_type": "LORA", "r": 8}'
        )
    values = {"task_type": str(task.value), **values, "inference_mode": False}
    try:
        return get_peft_config(values)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the adapter file {path} is no valid peft configuration: {error}"
        ) from error


def attach_adapter(model: nn.Module, folder: Path) -> Any:
    """The model with a saved adapter, as a `PeftModel`.

    Raises:
        UserError: if the files are damaged, lack tensors, or do not fit the model.
    """
    from peft import PeftModel

    problem = f"the adapter in {folder} cannot be attached to this model"
    with refusing(problem, "copy it again, and load the base that it was trained on"):
        if not (folder / "adapter_config.json").is_file():
            raise FileNotFoundError("adapter_config.json is missing")
        with quiet():
            warnings.filterwarnings("error", message=".*missing adapter keys")
            return PeftModel.from_pretrained(model, str(folder))
