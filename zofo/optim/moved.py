"""Keeps peft from saving an adapter without the base that it was trained with.

`save_pretrained` of a `PeftModel` writes the adapter only, and peft attaches it to the original
base without a word. Once the base has moved, the model therefore has a `save_pretrained` and a
`push_to_hub` of its own that refuse. They are a function without state, so they survive
`copy.deepcopy` and pickle. Whole state dicts, as `accelerate` saves them, hold the moved base and
stay allowed. So does the merged model, which is another object.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NoReturn

from torch import nn

from zofo.errors import UserError

_NAMES: Final = ("save_pretrained", "push_to_hub")


def refuse_to_save(*args: Any, **kwargs: Any) -> NoReturn:
    """Stands in for `save_pretrained` and `push_to_hub` of a model whose base has moved.

    Raises:
        UserError: always; it names the functions that save the base too.
    """
    raise UserError(
        "the base of this model has moved, and save_pretrained and push_to_hub write its adapter "
        "alone, which peft would attach to the original base; call trainer.save_model(FOLDER), in "
        "a loop of your own zofo.save_checkpoint(FOLDER, model, optimizer), or for tools without "
        "zofo model.merge_and_unload().save_pretrained(FOLDER)"
    )


def mark_moved(model: nn.Module, *, has_moved: bool = True) -> None:
    """Let each part of the model that would save its adapter alone refuse, or allow it again."""
    if has_moved:
        for module in model.modules():
            if _saves_adapter_alone(module):
                vars(module).update(dict.fromkeys(_NAMES, refuse_to_save))
    else:
        for module in _marked(model):
            _unmark(module)


@contextmanager
def saving_adapter(model: nn.Module) -> Iterator[None]:
    """Allow peft to save the adapter inside the context, where the caller saves the base too."""
    marked = _marked(model)
    for module in marked:
        _unmark(module)
    try:
        yield
    finally:
        for module in marked:
            vars(module).update(dict.fromkeys(_NAMES, refuse_to_save))


def _marked(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if vars(m).get(_NAMES[0]) is refuse_to_save]


def _unmark(module: nn.Module) -> None:
    for name in _NAMES:
        vars(module).pop(name, None)


def _saves_adapter_alone(module: nn.Module) -> bool:
    # The second is a model of transformers with an adapter of its own (`add_adapter`).
    is_peft = hasattr(type(module), "get_base_model") and hasattr(module, "peft_config")
    return hasattr(type(module), _NAMES[0]) and (
        is_peft or bool(getattr(module, "_hf_peft_config_loaded", False))
    )
