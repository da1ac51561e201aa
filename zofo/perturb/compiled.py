"""Modules under `torch.compile`, whose graphs ignore every hook that is set after tracing.

A graph takes the weights as inputs and looks them up in the modules at each call. zofo therefore
swaps all weights below a compiled module before its call and puts them back after it. Shapes and
dtypes stay the same, so nothing is compiled again.

`torch.compile(model)` and a compiled `forward` keep the module's own hooks outside the graph.
`module.compile()` traces them as well, so zofo wraps the compiled call instead.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

WRAPPED_NAME = "_orig_mod."
"""What `torch.compile(module)` inserts into the names of the parameters."""


def is_compiled(module: nn.Module) -> bool:
    """Whether the module or one of its methods is compiled."""
    return (
        module._compiled_call_impl is not None
        or _is_graph(vars(module).get("forward"))
        or _has_compiled_method(type(module))  # type: ignore[arg-type]
    )


def is_wrapper(module: nn.Module) -> bool:
    """Whether the module is the wrapper that `torch.compile(module)` returns."""
    return "_orig_mod" in module._modules and "dynamo_ctx" in vars(module)


def compiled_modules(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The compiled ones among the modules."""
    return [module for module in modules if is_compiled(module)]


def has_graphs() -> bool:
    """Whether `torch.compile` has traced anything in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and bool(dynamo.counters.get("frames"))


def running_eagerly() -> Any:
    """A context in which compiled modules run without their graphs."""
    # Under a dispatch mode, dynamo would refuse to compile the code that it meets, for good.
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


class AroundCompiledCall:
    """Runs functions before and after each call of a module compiled in place, until removed."""

    def __init__(
        self, module: nn.Module, before: Callable[[], None], after: Callable[[Any], Any]
    ) -> None:
        self._module, self._compiled = module, module._compiled_call_impl
        compiled: Any = self._compiled

        def call(*args: Any, **kwargs: Any) -> Any:
            before()
            output = None
            try:
                output = compiled(*args, **kwargs)
            finally:
                changed = after(output)
            return output if changed is None else changed

        module._compiled_call_impl = call

    def remove(self) -> None:
        """Put the compiled call back."""
        self._module._compiled_call_impl = self._compiled


class InsteadOfForward:
    """Makes a function the forward of one module, whose hooks stay, until removed."""

    def __init__(self, module: nn.Module, function: Callable[[Tensor], Any]) -> None:
        self._module = module
        # The argument keeps the name that it has in nn.Linear.forward, for calls by keyword.
        vars(module)["forward"] = lambda input: function(input)

    def remove(self) -> None:
        """Give the module its class's forward back."""
        vars(self._module).pop("forward", None)


def _is_graph(function: Any) -> bool:
    # `torch.compiler.disable` leaves the first mark too, on functions that it keeps from compiling.
    return hasattr(function, "_torchdynamo_orig_callable") and not getattr(
        function, "_torchdynamo_disable", False
    )


@functools.cache
def _has_compiled_method(kind: type[nn.Module]) -> bool:
    # The method resolution order holds the subclasses of nn.Module before nn.Module itself.
    kinds = kind.__mro__[: kind.__mro__.index(nn.Module)]
    return any(callable(f) and _is_graph(f) for k in kinds for f in vars(k).values())
