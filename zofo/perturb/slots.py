"""The places of a model that hold perturbed weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from zofo.errors import UserError
from zofo.perturb.quantized import Scales, check_in_place, put_scales, unit_of
from zofo.perturb.shards import is_sharded


@dataclass(frozen=True)
class Slot:
    """A place that holds a parameter.

    It is the entry `name` of `module`'s parameter table, or the scales of a quantised layer.
    """

    module: nn.Module
    name: str
    parameter: nn.Parameter
    tensor: int  # index that addresses its directions
    path: str  # full name, for messages

    @property
    def unit(self) -> float:
        """The unit of the parameter's directions."""
        return unit_of(self.parameter)

    def put(self, weight: nn.Parameter) -> None:
        """Let the module compute with another weight."""
        if isinstance(self.parameter, Scales):
            put_scales(self.module, weight)
        else:
            self.module._parameters[self.name] = weight

    @property
    def present(self) -> nn.Parameter:
        """The whole weight: the parameter, or what FSDP gathers of it for a forward."""
        if isinstance(self.parameter, Scales):
            check_in_place(self.module, self.parameter, self.path)
        if not is_sharded(self.parameter):
            return self.parameter
        present: Any = self.module._parameters[self.name]
        if is_sharded(present):
            raise UserError(
                f"the weight {self.path} is still sharded where it has to be perturbed, because a "
                "module around its FSDP unit reads it; apply fully_shard to that module instead of "
                "a module inside it"
            )
        return present
