"""Modules under `torch.compile`, whose graphs leave out every hook set after they were traced.

A graph does not hold the weights: it takes them as inputs, looked up in the modules at each call.
So a compiled module is seen perturbed when the weights of all that is under it are swapped from
outside, before its call, and put back after it. Shapes and dtypes stay: nothing is compiled again.

`torch.compile(model)` and a compiled `forward` leave the module's own hooks outside of the graph;
`module.compile()` takes them in, so its call is wrapped instead.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

WRAPPED_NAME = "_orig_mod."
"""What `torch.compile(module)` puts into the names of the parameters."""


def is_compiled(module: nn.Module) -> bool:
    """Whether it is compiled, by itself or in one of its methods."""
    return (
        module._compiled_call_impl is not None
        or _is_graph(vars(module).get("forward"))
        or _has_compiled_method(type(module))  # type: ignore[arg-type]
    )


def is_wrapper(module: nn.Module) -> bool:
    """Whether it is what `torch.compile(module)` returned."""
    return "_orig_mod" in module._modules and "dynamo_ctx" in vars(module)


def compiled_modules(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those that are compiled."""
    return [module for module in modules if is_compiled(module)]


def has_graphs() -> bool:
    """Whether `torch.compile` has traced anything in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and bool(dynamo.counters.get("frames"))


def running_eagerly() -> Any:
    """A context without graphs; under a dispatch mode dynamo gives up what it meets for good."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


class AroundCompiledCall:
    """Runs functions before and after the calls of a module compiled in place, until removed."""

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


def _is_graph(function: Any) -> bool:
    return hasattr(function, "_torchdynamo_orig_callable") and not getattr(
        function, "_torchdynamo_disable", False
    )


@functools.cache
def _has_compiled_method(kind: type[nn.Module]) -> bool:
    kinds = kind.__mro__[: kind.__mro__.index(nn.Module)]
    return any(callable(f) and _is_graph(f) for k in kinds for f in vars(k).values())
