"""Which module's call swaps which weights: for each the nearest module that is called and reads it.

Where a module reads the weights of its children instead of calling them, it is the owner of its
whole subtree: `zofo.perturb.view.ATOMIC`, peft's DoRA, compiled modules. The head of a model whose
forward was replaced (trl's and Liger's fused losses read it) is swapped for the whole forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from zofo.perturb.compiled import is_compiled
from zofo.perturb.tiles import TiledLinear, is_tileable

_SMALL_BYTES = 1 << 16
"""Of a weight that is seen perturbed for the whole forward; a hook would take longer than it."""
_SMALL_SHARE = 64
"""The small weights take no more scratch than this part of what the largest layer takes."""


@dataclass(frozen=True)
class Slot:
    """Where a parameter stands: the entry `name` of `module`'s parameter table."""

    module: nn.Module
    name: str
    parameter: nn.Parameter
    tensor: int
    path: str


@dataclass(eq=False)
class Owner:
    """A module whose call swaps the weights in its slots."""

    module: nn.Module
    slots: list[Slot] = field(default_factory=list)
    ties: list[tuple[Slot, Slot]] = field(default_factory=list)
    """Further places of a weight, each with the slot that swaps it: a tie stays a tie."""
    calls: int = 0
    """Calls under way: a module that calls itself is swapped once."""
    tiles: TiledLinear | None = None
    """For a large linear layer: its product is computed in place of its swap."""

    @property
    def is_lookup(self) -> bool:
        """A plain embedding, whose output is rows of its weight: only those are perturbed."""
        module = self.module
        return (
            type(module) is nn.Embedding
            and module.max_norm is None
            and "forward" not in vars(module)
            and not is_compiled(module)
            and [slot.module for slot in self.slots] == [module]
            and module.weight.is_contiguous()
        )

    @property
    def num_bytes(self) -> int:
        """Size of the weights in its slots."""
        return sum(s.parameter.numel() * s.parameter.element_size() for s in self.slots)

    def swap_out(self) -> None:
        """Put the parameters themselves back."""
        for slot in (*self.slots, *(other for other, _ in self.ties)):
            slot.module._parameters[slot.name] = slot.parameter


def find_owners(
    model: nn.Module,
    tensors: Mapping[nn.Parameter, int],
    atomic: tuple[type[nn.Module], ...],
    children_read: Mapping[str, tuple[str, ...]],
) -> list[Owner]:
    """The modules to hook.

    Args:
        model: whose calls are watched.
        tensors: direction indices of the parameters that are perturbed.
        atomic: classes that read the weights of their children directly.
        children_read: names of classes, and of the children whose weights they read directly.
    """
    owners: dict[nn.Module, Owner] = {}

    def visit(module: nn.Module, path: str, holder: nn.Module, fixed: bool) -> None:
        # A module may stand in a subtree that is swapped whole, and be called outside of it too.
        place = (module, holder if fixed else None)
        if place in seen:
            return
        seen.add(place)
        if module in heads:
            # peft calls the patched forward without its hooks: only the outermost call is certain.
            holder, fixed = model, True
        heads.update(_head_read_by(module))
        # A container without a forward of its own is read by whoever holds it.
        compiled = is_compiled(module)
        if not fixed and (compiled or _is_called(module)):
            holder = module
        fixed = fixed or compiled or isinstance(module, atomic) or _reads_children(module)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter in tensors:
                owner = owners.setdefault(holder, Owner(holder))
                slot = Slot(module, name, parameter, tensors[parameter], f"{path}{name}")
                first = next((s for s in owner.slots if s.parameter is parameter), None)
                if first is None:
                    owner.slots.append(slot)
                else:
                    owner.ties.append((slot, first))
        read = children_read.get(type(module).__name__, ())
        for name, child in module.named_children():
            visit(child, f"{path}{name}.", holder, fixed or name in read)

    seen: set[tuple[nn.Module, nn.Module | None]] = set()
    heads: set[nn.Module] = set()
    visit(model, "", model, False)
    return list(owners.values())


def take_small(owners: Sequence[Owner]) -> list[Slot]:
    """Take the slots of small weights from their owners, up to a part of the largest layer."""
    hooked = [owner for owner in owners if not owner.is_lookup]
    room = max((owner.num_bytes for owner in hooked), default=0) // _SMALL_SHARE
    taken = []
    for owner in hooked:
        tied = [slot for _, slot in owner.ties]
        for slot in [slot for slot in owner.slots if slot not in tied]:
            size = slot.parameter.numel() * slot.parameter.element_size()
            is_bias_of_tiles = slot.name == "bias" and is_tileable(slot.module)
            if is_bias_of_tiles or size <= min(_SMALL_BYTES, room):
                room -= 0 if is_bias_of_tiles else size
                owner.slots.remove(slot)
                taken.append(slot)
    return taken


def _is_called(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _reads_children(module: nn.Module) -> bool:
    """Peft's DoRA computes the norm of its base layer's weight; trained tokens replace its rows."""
    use_dora = getattr(module, "use_dora", None)
    is_dora = isinstance(use_dora, dict) and any(use_dora.values())
    return is_dora or hasattr(module, "trainable_tokens_delta")


def _head_read_by(module: nn.Module) -> list[nn.Module]:
    """A forward set on the instance may read the output embeddings instead of calling them."""
    if "forward" not in vars(module) or not hasattr(type(module), "get_output_embeddings"):
        return []
    head = module.get_output_embeddings()  # type: ignore[operator]
    return [head] if isinstance(head, nn.Module) else []
