"""Which module owns which weights: the calls of the owner swap them.

The owner of a weight is the nearest enclosing module that is called. A module that reads the
weights of its children without calling them owns its whole subtree. The parent of a depthwise
convolution owns the convolution. Such modules are those of
`zofo.perturb.view.ATOMIC`, peft's DoRA layers and compiled modules. If the forward of a model was
replaced, the model owns its head, because the fused losses of trl and Liger read the head's weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from zofo.noise.combine import Distribution
from zofo.perturb.compiled import is_compiled
from zofo.perturb.quantized import places_of
from zofo.perturb.shards import is_sharded, kind_of
from zofo.perturb.slots import Slot
from zofo.perturb.tiles import ROWS, TiledLinear, is_tileable

# A weight of at most this size is swapped for the whole forward, because the hooks of its module
# would take longer than its computation.
_SMALL_BYTES = 1 << 16
_SMALL_SHARE = 64
"""All small weights together have at most the size of the largest layer divided by this.

The biases of tiled layers come on top.
"""


ATOMIC: tuple[type[nn.Module], ...] = (
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.RNNBase,
)
"""Module classes that read the weights of their children directly."""

_MAMBA = ("conv1d", "x_proj", "dt_proj", "out_proj", "norm")
_MIXERS = (
    *("MambaMixer", "FalconMambaMixer", "Mamba2Mixer", "JambaMambaMixer", "BambaMixer"),
    *("FalconH1Mixer", "GraniteMoeHybridMambaLayer", "NemotronHMamba2Mixer", "Zamba2MambaMixer"),
)
CHILDREN_READ: dict[str, tuple[str, ...]] = {
    "DebertaEncoder": ("rel_embeddings",),
    "DebertaV2Encoder": ("rel_embeddings",),
    **dict.fromkeys(_MIXERS, _MAMBA),
}
"""Class name -> paths of the modules below it whose own weights its forward reads directly."""


@dataclass(eq=False)
class Owner:
    """A module whose call swaps the weights in its slots."""

    module: nn.Module
    slots: list[Slot] = field(default_factory=list)
    ties: list[tuple[Slot, Slot]] = field(default_factory=list)
    """Further places of a tied weight, each with the slot that swaps it."""
    replaced: list[nn.Parameter] = field(default_factory=list)
    """What the slots held before the swap; empty without a swap."""
    calls: int = 0
    """Number of running calls. Only the outermost one swaps, if a module calls itself."""
    tiles: TiledLinear | None = None
    """Computes the product of a large linear layer without a swap; None for other modules."""

    @property
    def is_lookup(self) -> bool:
        """Whether this is a plain embedding, of which only the rows that it reads are perturbed."""
        module = self.module
        return (
            kind_of(module) is nn.Embedding
            and module.max_norm is None
            and "forward" not in vars(module)
            and not is_compiled(module)
            and [slot.module for slot in self.slots] == [module]
            and module.weight.is_contiguous()
        )

    @property
    def num_bytes(self) -> int:
        """Size of the weights in the slots."""
        return sum(slot.parameter.nbytes for slot in self.slots)

    def swap_out(self) -> None:
        """Put back what the swap replaced."""
        for slot, parameter in zip(self.slots, self.replaced, strict=False):
            slot.put(parameter)
            for other, first in self.ties:
                if first is slot:
                    other.put(parameter)
        self.replaced = []


def find_owners(
    model: nn.Module,
    tensors: Mapping[nn.Parameter, int],
    atomic: tuple[type[nn.Module], ...],
    children_read: Mapping[str, tuple[str, ...]],
) -> list[Owner]:
    """Find the owners of all perturbed parameters.

    Args:
        model: the module whose forward is perturbed.
        tensors: parameter -> tensor index of its directions.
        atomic: classes that read the weights of their children directly.
        children_read: class name -> paths of the modules below it whose weights it reads directly.
    """
    owners: dict[nn.Module, Owner] = {}

    # `holder` owns the weights that are found. `fixed` keeps it the owner of the whole subtree.
    # `reads` maps modules to the module around them whose call swaps their weights.
    def visit(
        module: nn.Module,
        path: str,
        holder: nn.Module,
        fixed: bool,
        reads: Mapping[nn.Module, nn.Module],
    ) -> None:
        if module in heads:
            # peft calls the replaced forward without hooks, so only the model's own call is sure.
            holder, fixed = model, True
        elif module in reads:
            holder, fixed = reads[module], True
        # A container without a forward is never called, so its holder reads its weights.
        compiled = is_compiled(module)
        if not fixed and (compiled or _is_called(module)):
            holder = module
        # A shared module may have several holders, such as layers that read one bank of vectors.
        place = (module, holder, fixed)
        if place in seen:
            return
        seen.add(place)
        heads.update(_head_read_by(module))
        fixed = fixed or compiled or isinstance(module, atomic) or _reads_children(module)
        for name, parameter in places_of(module):
            if parameter in tensors:
                owner = owners.setdefault(holder, Owner(holder))
                slot = Slot(module, name, parameter, tensors[parameter], f"{path}{name}")
                first = next((s for s in owner.slots if s.parameter is parameter), None)
                if first is None:
                    owner.slots.append(slot)
                else:
                    owner.ties.append((slot, first))
        for read in children_read.get(kind_of(module).__name__, ()):
            with contextlib.suppress(AttributeError):  # Not every instance has every child.
                reads = {module.get_submodule(read): holder, **reads}
        for name, child in module.named_children():
            visit(child, f"{path}{name}.", holder, fixed or _is_depthwise(child), reads)

    seen: set[tuple[nn.Module, nn.Module, bool]] = set()
    heads: set[nn.Module] = set()
    visit(model, "", model, False, {})
    return list(owners.values())


def take_small(owners: Sequence[Owner], largest: int) -> list[Slot]:
    """Remove the slots of small weights from their owners, and return them.

    Args:
        owners: of the perturbed weights.
        largest: size of the largest layer in bytes.
    """
    hooked = [owner for owner in owners if not owner.is_lookup]
    room = largest // _SMALL_SHARE
    taken = []
    for owner in hooked:
        tied = [slot for _, slot in owner.ties]
        for slot in [slot for slot in owner.slots if slot not in tied]:
            if is_sharded(slot.parameter):  # the whole weight is there only for the owner's call
                continue
            size = slot.parameter.nbytes
            # `TiledLinear` takes the bias as it finds it, so the bias must be perturbed beforehand.
            is_bias_of_tiles = slot.name == "bias" and is_tileable(slot.module)
            if is_bias_of_tiles or size <= min(_SMALL_BYTES, room):
                room -= 0 if is_bias_of_tiles else size
                owner.slots.remove(slot)
                taken.append(slot)
    return taken


def give_tiles(
    owners: Sequence[Owner], seed: int, distribution: Distribution
) -> dict[torch.dtype, Tensor]:
    """Give large linear layers their tiles; returns the scratch that they share, by dtype."""
    found: list[tuple[Owner, Slot]] = []
    for owner in owners:
        is_alone = len(owner.slots) == 1 and not owner.ties
        slot = owner.slots[0]
        is_weight = slot.module is owner.module and slot.name == "weight"
        if is_alone and is_weight and is_tileable(owner.module):
            found.append((owner, slot))
    sizes: dict[torch.dtype, int] = {}  # elements of the widest layer's tile
    for _, slot in found:
        dtype, width = slot.parameter.dtype, slot.parameter.shape[1]
        sizes[dtype] = max(sizes.get(dtype, 0), ROWS * width)
    scratch = {dtype: torch.empty(size, dtype=dtype) for dtype, size in sizes.items()}
    for owner, slot in found:
        tile = scratch[slot.parameter.dtype]
        owner.tiles = TiledLinear(slot, tile, seed=seed, distribution=distribution)
    return scratch


def _is_called(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _is_depthwise(module: nn.Module) -> bool:
    # Mixers of Mamba's kind (Qwen3-Next, Bamba, LFM2) pass this small weight to a fused kernel.
    return isinstance(module, nn.Conv1d) and module.groups == module.in_channels > 1


def _reads_children(module: nn.Module) -> bool:
    # DoRA computes the norm of its base layer's weight. Trained tokens replace rows of it.
    use_dora = getattr(module, "use_dora", None)
    is_dora = isinstance(use_dora, dict) and any(use_dora.values())
    return is_dora or hasattr(module, "trainable_tokens_delta")


def _head_read_by(module: nn.Module) -> list[nn.Module]:
    # A forward that is set on the instance may read the output embeddings without calling them.
    if "forward" not in vars(module) or not hasattr(type(module), "get_output_embeddings"):
        return []
    head = module.get_output_embeddings()  # type: ignore[operator]
    return [head] if isinstance(head, nn.Module) else []
