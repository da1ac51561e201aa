"""Load weights that fit their model, so that none is random without a word.

A library fills a weight that a folder lacks with random numbers. Here, only the head of a
classifier may be new. Anything else that is missing, or that has another shape, is refused. If a
wrapper such as `torch.compile` or DistributedDataParallel wrote its name before the names of the
weights, then the name is removed.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from zofo.console import quiet
from zofo.errors import UserError

_INSIDE: Final = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names that wrappers of single modules insert."""
_OUTSIDE: Final = ("module", "model", "base_model", "net", "_forward_module")
"""Names that wrappers of a whole model put before all others."""
_NEW: Final = "zofo_new_weights"
"""The attribute of a loaded model that holds the names of its new weights."""


def new_weights(model: nn.Module) -> frozenset[str]:
    """The weights that loading initialised because the folder lacks them: a new head.

    The names are those in the model without an adapter. It is empty for models that
    `zofo.models.loading.load_model` did not load.
    """
    return getattr(model, _NEW, frozenset())


def notes_on_new(model: nn.Module) -> list[str]:
    """A sentence on the new weights of a model, if it has any."""
    new = new_weights(model)
    return [f"the head is new and begins at random: {_named(new)}"] if new else []


def new_modules(model: nn.Module) -> list[str]:
    """The outermost modules all of whose weights are new.

    Raises:
        UserError: if a new weight lies beside weights that were loaded, so an adapter cannot train
            it.
    """
    new = new_weights(model)
    found: list[str] = []
    for name, module in model.named_modules():
        inside = {f"{name}.{inner}" for inner, _ in module.named_parameters()}
        if name and inside and inside <= new and not name.startswith(tuple(f"{f}." for f in found)):
            found.append(name)
    rest = {n for n in new if not n.startswith(tuple(f"{f}." for f in found))}
    if rest:
        raise UserError(
            f"the weights {_named(rest)} of the model are new and no adapter can train them alone; "
            "choose method fo-ft, or a model that has them"
        )
    return found


def mark_new(model: nn.Module, stored: Collection[str]) -> None:
    """Mark the head's weights that a folder lacks as new, as `load_fitting` does.

    Args:
        model: a classifier without weights.
        stored: the names in the model's files; empty if they are not known.
    """
    if not stored:
        return
    prefix: Any = model.base_model_prefix
    known = {key.removeprefix(f"{prefix}.") for key in stored}
    missing = {n for n, _ in model.named_parameters() if n.removeprefix(f"{prefix}.") not in known}
    setattr(model, _NEW, frozenset(key for key in missing if _is_of_head(key, model)))


def modules_of_head(head: str, config: Any, *, trust_remote_code: bool = False) -> list[str]:
    """The modules of a classification head with the pooler before it; none for another head.

    Args:
        head: "causal-lm", "seq2seq" or "classification".
        config: configuration of the model.
        trust_remote_code: whether to run code from the model's repository.
    """
    import transformers as hf

    if head != "classification":
        return []
    with torch.device("meta"):  # Nothing is computed, so the simplest attention will do.
        model = hf.AutoModelForSequenceClassification.from_config(
            config, attn_implementation="eager", trust_remote_code=trust_remote_code
        )
    names = (name for name, _ in model.named_parameters())
    return sorted({name.rpartition(".")[0] for name in names if _is_of_head(name, model)})


def load_fitting(
    cls: Any, source: str, *, name: str, is_classifier: bool, seed: int, **kwargs: Any
) -> nn.Module:
    """Load a model, and refuse weights that do not fit it.

    Args:
        cls: the class of transformers that loads it.
        source: folder or hub id.
        name: the model as the user named it.
        is_classifier: whether its head may be new.
        seed: seed of the initial weights of a new head.
        kwargs: arguments of `from_pretrained`.

    Raises:
        UserError: if weights are missing or have another shape.
    """

    def load(key_mapping: dict[str, str]) -> tuple[Any, dict[str, Any]]:
        with quiet():
            torch.manual_seed(seed)
            loaded: tuple[Any, dict[str, Any]] = cls.from_pretrained(
                source,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # They are refused here, with their names.
                key_mapping=key_mapping or None,
                **kwargs,
            )
        return loaded

    model, report = load({})
    added = _added_by_wrapper(report["unexpected_keys"], report["missing_keys"], model)
    if added is not None:
        model, report = load({added: ""})
        # transformers would write the removed names again when it saves the model.
        model._weight_conversions = [
            rule for rule in model._weight_conversions if added not in rule.source_patterns
        ]
    missing = set(report["missing_keys"])
    head = {key for key in missing if _is_of_head(key, model)} if is_classifier else set()
    _refuse_other_shapes(report["mismatched_keys"], model, name, is_classifier)
    _refuse_missing(missing - head, report["unexpected_keys"], model, name)
    if added is not None:
        warnings.warn(
            f"the names of the weights in {name} begin with the name of a wrapper, which was "
            "removed; save the model without the wrapper to be rid of this warning",
            stacklevel=3,
        )
    setattr(model, _NEW, frozenset(head))
    loaded: nn.Module = model
    return loaded


def _added_by_wrapper(
    unexpected: Collection[str], missing: Collection[str], model: Any
) -> str | None:
    """A pattern of what wrappers added to the names, if the missing ones are there without it."""
    prefix = f"{model.base_model_prefix}."
    wanted = {key.removeprefix(prefix) for key in missing}
    inside = rf"(?:(?:{'|'.join(_INSIDE)})\.)"
    outer = rf"(?:(?:{'|'.join(_OUTSIDE)})\.)"
    best, most = None, 0
    for num in range(4):  # names of wrappers before all others
        pattern = rf"^{inside}*(?:{outer}{inside}*){{{num}}}" if num else inside
        found = {re.sub(pattern, "", key) for key in unexpected}
        hits = len({key.removeprefix(prefix) for key in found} & wanted)
        if hits > most:
            best, most = pattern, hits
    return best


def _is_of_head(key: str, model: Any) -> bool:
    """Whether a weight belongs to the head of a classifier, or to the pooler before it."""
    prefix = model.base_model_prefix
    if not prefix or not hasattr(model, prefix):
        return key.split(".")[0] in ("classifier", "score", "pooler")
    return not key.startswith(f"{prefix}.") or "pooler" in key.split(".")


def _refuse_missing(
    missing: Collection[str], unexpected: Collection[str], model: nn.Module, name: str
) -> None:
    if not missing:
        return
    there = f"; it holds {_named(unexpected)} instead" if unexpected else ""
    raise UserError(
        f"the model {name!r} lacks {len(missing)} of its {len(model.state_dict())} weights, "
        f"{_named(missing)}{there}. They would be random; download or save the model again"
    )


def _refuse_other_shapes(
    mismatched: Collection[tuple[str, Any, Any]], model: nn.Module, name: str, is_classifier: bool
) -> None:
    if not mismatched:
        return
    keys = sorted(mismatched, key=lambda entry: entry[0])
    if is_classifier and all(_is_of_head(key, model) for key, _, _ in keys):
        key, stored, built = keys[-1]
        raise UserError(
            f"the head of {name!r} has another number of classes than the task: {key} is "
            f"{_shape(stored)} there and {_shape(built)} is needed; use data with {stored[0]} "
            "classes, or a model without a trained head"
        )
    shapes = ", ".join(
        f"{key} is {_shape(stored)} there and {_shape(built)} by config.json"
        for key, stored, built in keys[:2]
    )
    raise UserError(
        f"the weights of the model {name!r} do not fit its config.json, {len(keys)} of them: "
        f"{shapes}; use the config.json that belongs to the weights"
    )


def _named(keys: Collection[str]) -> str:
    """The first names in an order that a reader expects, and how many follow."""
    first = sorted(keys)[:3]
    more = f" and {len(keys) - len(first)} more" if len(keys) > len(first) else ""
    return ", ".join(first) + more


def _shape(size: Any) -> str:
    return "×".join(map(str, size))


def explained(error: Exception, source: str, name: str, aliases: Collection[str]) -> str:
    """What to do about an error that transformers raised while it loaded a model.

    Args:
        error: the error.
        source: folder or hub id that was loaded.
        name: the model as the user named it.
        aliases: names of the models that need no download.
    """
    if isinstance(error, ValueError) and "trust_remote_code" in str(error):
        return "pass trust_remote_code=true if you trust its authors"
    if isinstance(error, ImportError):
        return (
            "install that package, or choose a model or an attn_implementation that needs no "
            "package more"
        )
    folder = Path(source)
    if not folder.is_dir():
        return (
            f"give a hub id that this machine can reach or has cached, a folder (now looked for "
            f"in {Path.cwd()}), or one of {', '.join(aliases)}"
        )
    for file in sorted(folder.iterdir()):
        problem = _damage_of(file)
        if problem is not None:
            return f"{file.name} {problem}"
    return f"repair the folder {name}, or choose another model"


def _damage_of(file: Path) -> str | None:
    """What is wrong with a file of a model, and what to do; None if nothing is."""
    from safetensors import safe_open

    try:
        with file.open("rb") as opened:
            if opened.read(40).startswith(b"version https://git-lfs"):
                return "is a pointer of Git LFS and not the file itself; run 'git lfs pull'"
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass
    except IsADirectoryError:
        return None
    except Exception:
        return "is damaged or incomplete; download it again"
    return None
