"""The model seen at w + scale · v, without writing w.

A forward pre-hook on each module that owns moved weights computes w + scale · v into a scratch
buffer and puts that in the module's parameter table; the post-hook puts the parameter itself back.
The parameter is never written, so nothing has to be undone: an exception, Ctrl-C or a kill leaves
every bit where it was. Each layer's scratch is reused by the next: the extra memory is that of the
largest layer. Weights too small to be worth a hook (norms, biases) are computed all at once, before
the forward, into a scratch of their own.

Modules that read a child's weight directly (instead of calling the child) would see it unperturbed.
The known ones (`ATOMIC`, and peft's DoRA) are swapped as a whole subtree, as are compiled modules;
single children (`CHILDREN_READ`) for as long as their parent runs; and the head of a model whose
forward was replaced (trl's and Liger's fused losses read it) for the whole forward. Any other is
found by the self-check, which watches every tensor operation of one perturbed forward for reads of
the original weights and names the module.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from zofo.compiled import AroundCompiledCall, compiled_modules, is_compiled, running_eagerly
from zofo.noise import Distribution, combine_rows, prepare
from zofo.tiles import ROWS, TiledLinear, is_tileable

ATOMIC: tuple[type[nn.Module], ...] = (
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.RNNBase,
)
"""Module classes that read the weights of their children directly."""

_MAMBA = ("conv1d", "x_proj", "dt_proj", "out_proj")
CHILDREN_READ: dict[str, tuple[str, ...]] = {
    "DebertaEncoder": ("rel_embeddings",),
    "DebertaV2Encoder": ("rel_embeddings",),
    "MambaMixer": _MAMBA,
    "FalconMambaMixer": _MAMBA,
    "Mamba2Mixer": _MAMBA,
}
"""Names of classes, and of the children whose own weights their forward reads directly."""

_ALIGNMENT = 64
_SMALL_BYTES = 1 << 16
"""Of a weight that is seen perturbed for the whole forward; a hook would take longer than it."""
_SMALL_SHARE = 64
"""The small weights take no more scratch than this part of what the largest layer takes."""


_Place = tuple[int, torch.dtype, torch.device]
"""Of a scratch buffer: depth of nesting, dtype, device."""


class SelfCheckError(RuntimeError):
    """A weight is read around its module, so the model cannot be seen perturbed."""


@dataclass(frozen=True)
class _Slot:
    """Where a parameter stands: the entry `name` of `module`'s parameter table."""

    module: nn.Module
    name: str
    parameter: nn.Parameter
    tensor: int
    path: str


@dataclass(frozen=True)
class _Swap:
    """Scratch for some slots, laid out once: it holds while the weights stay where they are."""

    addresses: list[int]
    parameters: list[nn.Parameter]
    compute: Callable[[float, int, int], None]


@dataclass(eq=False)
class _Owner:
    """A module whose call swaps the weights in its slots."""

    module: nn.Module
    slots: list[_Slot] = field(default_factory=list)
    ties: list[tuple[_Slot, _Slot]] = field(default_factory=list)
    """Further places of a weight, each with the slot that swaps it: a tie stays a tie."""
    calls: int = 0
    """Calls under way: a module that calls itself is swapped once."""
    swaps: dict[int, _Swap] = field(default_factory=dict)
    """By depth of nesting."""
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


class Perturbation:
    """The perturbed view of a model.

    Args:
        model: the model whose forward is to be seen perturbed.
        parameters: what is perturbed.
        tensors: their direction indices, as in `Blocks.base_index`.
        seed: run seed in [0, 2^64).
        distribution: "rademacher" or "gaussian".
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        tensors: Sequence[int],
        *,
        seed: int,
        distribution: Distribution = "rademacher",
    ) -> None:
        self.seed, self.distribution = seed, distribution
        self._tensors = dict(zip(parameters, tensors, strict=True))
        self._owners: list[_Owner] = []
        self._small = _Owner(model)
        self._entered: dict[_Owner, None] = {}
        self._scratch: dict[_Place, Tensor] = {}
        self._stack: list[_Owner] = []
        self._is_active = False
        self._watch: _ReadWatch | None = None
        self.follow(model)

    def follow(self, model: nn.Module) -> None:
        """Watch the calls of another module that holds the weights: accelerate wraps models."""
        self._model, self._modules = model, list(model.modules())
        self._compiled = compiled_modules(self._modules)
        self._owners = _find_owners(model, self._tensors)
        self._small = _Owner(model, _take_small(self._owners))
        self._owners = [owner for owner in self._owners if owner.slots]
        self._tile = self._make_tiles()
        whole = sum(p.numel() for p in model.parameters())
        for owner in self._owners:
            size = sum(slot.parameter.numel() for slot in owner.slots)
            if is_compiled(owner.module) and 2 * size > whole:
                warnings.warn(
                    f"{type(owner.module).__name__} is compiled as a whole, so every perturbed "
                    f"evaluation needs a copy of its {size:,} moved weights. To need a copy of one "
                    "layer, compile them: for layer in model.model.layers: layer.compile()",
                    stacklevel=2,
                )

    @property
    def is_compiled(self) -> bool:
        """Whether the model has parts under `torch.compile`."""
        return bool(self._compiled)

    @property
    def model(self) -> nn.Module:
        """The module whose calls are watched."""
        return self._model

    @contextmanager
    def at(
        self, scale: float, *, step: int, direction: int = 0, self_check: bool = False
    ) -> Iterator[None]:
        """Within the context the model computes with w + scale · v[step, direction].

        Args:
            scale: eps, or −eps for the other side of a central difference.
            step: the optimiser step.
            direction: index of the direction.
            self_check: watch for reads of the unperturbed weights.

        Raises:
            SelfCheckError: if such a read happens; names the weight and its module.
        """
        if self._is_active:
            raise RuntimeError("the model is already being evaluated at a perturbed point")
        if compiled_modules(self._modules) != self._compiled:
            self.follow(self._model)
        self._entered.clear()
        handles: list[Any] = []
        self._watch = _ReadWatch([*self._owners, self._small]) if self_check else None

        def look_up(module: nn.Module, args: Any, kwargs: Any, output: Any, owner: _Owner) -> Any:
            if not isinstance(output, Tensor):  # the module failed
                return None
            ids = args[0] if args else kwargs["input"]
            self._note(owner)
            with self._paused():
                return self._looked_up(owner.slots[0], ids, scale, step, direction)

        def enter(module: nn.Module, owner: _Owner) -> None:
            owner.calls += 1
            if owner.calls > 1:
                return
            self._note(owner)
            self._stack.append(owner)
            with self._paused():
                self._swap_in(owner, scale, step, direction, depth=len(self._stack))
                for other, slot in owner.ties:
                    other.module._parameters[other.name] = slot.module._parameters[slot.name]

        def multiply(x: Tensor, owner: _Owner, tiles: TiledLinear) -> Any:
            module: Any = owner.module
            with self._paused():
                if owner.calls == 0 and tiles.serves(x, module.bias):
                    self._note(owner)
                    return tiles(x, module.bias, scale, step, direction)
            output = None
            enter(module, owner)
            try:
                output = nn.Linear.forward(module, x)
            finally:
                safe = leave(module, owner, output)
            return output if safe is None else safe

        def leave(module: nn.Module, owner: _Owner, output: Any) -> Any:
            if owner.calls == 0:  # another pre-hook failed before ours ran
                return None
            owner.calls -= 1
            if owner.calls:
                return None
            with self._paused():
                safe = self._detach_from_scratch(output)
                self._swap_out(owner)
            self._stack.remove(owner)
            return None if safe is output else safe

        self._is_active = True
        try:
            self._swap_in(self._small, scale, step, direction, depth=0)
            for owner in self._owners:
                if owner.is_lookup:
                    # First among the hooks: another's noise on the output stays (NEFTune).
                    handles.append(
                        owner.module.register_forward_hook(
                            lambda module, args, kwargs, output, owner=owner: look_up(
                                module, args, kwargs, output, owner
                            ),
                            prepend=True,
                            with_kwargs=True,
                        )
                    )
                    if self._watch is not None:
                        handles += self._watch.pause_during(owner.module)
                    continue
                if owner.tiles is not None:
                    function = functools.partial(multiply, owner=owner, tiles=owner.tiles)
                    handles.append(_InsteadOfForward(owner.module, function))
                    continue
                if owner.module._compiled_call_impl is not None:
                    handles.append(
                        AroundCompiledCall(
                            owner.module,
                            functools.partial(enter, owner.module, owner),
                            functools.partial(leave, owner.module, owner),
                        )
                    )
                    continue
                handles.append(
                    owner.module.register_forward_pre_hook(
                        lambda module, _, owner=owner: enter(module, owner), prepend=True
                    )
                )
                handles.append(
                    owner.module.register_forward_hook(
                        lambda module, _, output, owner=owner: leave(module, owner, output),
                        always_call=True,
                    )
                )
            if self._watch is None:
                yield
            else:
                with running_eagerly(), self._watch:
                    yield
        finally:
            for handle in handles:
                handle.remove()
            for owner in (*self._owners, self._small):
                owner.calls = 0
                self._swap_out(owner)
            self._stack.clear()
            self._watch, self._is_active = None, False

    @property
    def largest_layer_bytes(self) -> int:
        """Size of the scratch that the largest layer will need, with that of the small weights."""
        layers = (o for o in self._owners if not o.is_lookup and o.tiles is None)
        tiles = sum(t.numel() * t.element_size() for t in self._tile.values())
        return max(map(_num_bytes, layers), default=0) + _num_bytes(self._small) + tiles

    @property
    def scratch_bytes(self) -> int:
        """Size of the scratch buffers held between evaluations."""
        held = (*self._scratch.values(), *self._tile.values())
        return sum(t.numel() * t.element_size() for t in held)

    @property
    def entered(self) -> Collection[Any]:
        """Where the last evaluation saw the perturbation."""
        return tuple(self._entered)

    def check_entered(self, expected: Collection[Any]) -> None:
        """Make sure that the last evaluation saw the perturbation wherever an eager one did.

        Args:
            expected: what `entered` was after the eager one.

        Raises:
            SelfCheckError: if not; names a weight that it saw unperturbed.
        """
        missing = next((owner for owner in expected if owner not in self._entered), None)
        if missing is not None:
            raise SelfCheckError(
                f"a graph of torch.compile reads the weight {missing.slots[0].path} unperturbed, "
                "so its zeroth-order estimate would be wrong. Compile modules in place, "
                "model.compile(), not the loss function around them; or make the optimizer with "
                "what torch.compile(model) returned"
            )

    def _note(self, owner: _Owner) -> None:
        # What is called inside of a compiled module is called only while that runs eagerly.
        if not any(is_compiled(other.module) for other in self._stack):
            self._entered[owner] = None

    def _make_tiles(self) -> dict[torch.dtype, Tensor]:
        """Find the layers that are computed in tiles; returns the scratch that they share."""
        found: list[tuple[_Owner, _Slot]] = []
        for owner in self._owners:
            module, slots = owner.module, owner.slots
            is_alone = len(slots) == 1 and not owner.ties and not self._compiled
            if is_alone and slots[0].module is module and is_tileable(module):
                found.append((owner, slots[0]))
        sizes: dict[torch.dtype, int] = {}
        for _, slot in found:
            dtype, width = slot.parameter.dtype, slot.parameter.shape[1]
            sizes[dtype] = max(sizes.get(dtype, 0), ROWS * width)
        scratch = {dtype: torch.empty(size, dtype=dtype) for dtype, size in sizes.items()}
        for owner, slot in found:
            owner.tiles = TiledLinear(
                slot.parameter,
                slot.tensor,
                scratch[slot.parameter.dtype],
                seed=self.seed,
                distribution=self.distribution,
            )
        return scratch

    def _paused(self) -> Any:
        return self._watch.paused() if self._watch else nullcontext()

    def _looked_up(
        self, slot: _Slot, ids: Tensor, scale: float, step: int, direction: int
    ) -> Tensor:
        """What the embedding returns at the perturbed point, from the rows that it reads."""
        # A row is computed as often as it is read: to find the distinct ones would make the host
        # wait for the device.
        table = combine_rows(
            slot.parameter,
            ids.reshape(-1).long(),
            scale,
            seed=self.seed,
            step=step,
            tensor=slot.tensor,
            first_direction=direction,
            distribution=self.distribution,
        )
        return table.view(*ids.shape, -1)

    def _swap_in(self, owner: _Owner, scale: float, step: int, direction: int, depth: int) -> None:
        swap = owner.swaps.get(depth)
        if swap is None or swap.addresses != [s.parameter.data_ptr() for s in owner.slots]:
            swap = owner.swaps[depth] = self._new_swap(owner, depth)
        swap.compute(scale, step, direction)
        for slot, parameter in zip(owner.slots, swap.parameters, strict=True):
            slot.module._parameters[slot.name] = parameter

    @staticmethod
    def _swap_out(owner: _Owner) -> None:
        for slot in (*owner.slots, *(other for other, _ in owner.ties)):
            slot.module._parameters[slot.name] = slot.parameter

    def _new_swap(self, owner: _Owner, depth: int) -> _Swap:
        weights = [slot.parameter for slot in owner.slots]
        views = self._views(owner, depth)
        return _Swap(
            [weight.data_ptr() for weight in weights],
            [nn.Parameter(view, requires_grad=False) for view in views],
            prepare(
                weights,
                views,
                tensors=[slot.tensor for slot in owner.slots],
                seed=self.seed,
                distribution=self.distribution,
            ),
        )

    def _views(self, owner: _Owner, depth: int) -> list[Tensor]:
        """One scratch tensor for each slot, from the buffer of this nesting depth."""
        needed: dict[_Place, int] = {}
        places = []
        for slot in owner.slots:
            place = (depth, slot.parameter.dtype, slot.parameter.device)
            places.append((place, needed.get(place, 0)))
            padded = -(-slot.parameter.numel() // _ALIGNMENT) * _ALIGNMENT
            needed[place] = needed.get(place, 0) + padded
        for place, size in needed.items():
            if place not in self._scratch or self._scratch[place].numel() < size:
                # Nothing may hold on to the smaller buffer.
                self._scratch.pop(place, None)
                for other in self._owners:
                    other.swaps.pop(depth, None)
                self._scratch[place] = torch.empty(size, dtype=place[1], device=place[2])
        return [
            self._scratch[place][start : start + slot.parameter.numel()].view(slot.parameter.shape)
            for slot, (place, start) in zip(owner.slots, places, strict=True)
        ]

    def _detach_from_scratch(self, output: Any) -> Any:
        """Copy what a module returns of its own weights: the next layer reuses the buffer."""
        buffers = {t.untyped_storage().data_ptr() for t in self._scratch.values()}

        def is_scratch(t: Tensor) -> bool:
            return t.layout == torch.strided and t.untyped_storage().data_ptr() in buffers

        if isinstance(output, Tensor):
            return output.clone() if is_scratch(output) else output
        if any(isinstance(t, Tensor) and is_scratch(t) for t in tree_iter(output)):
            return tree_map_only(Tensor, lambda t: t.clone() if is_scratch(t) else t, output)
        return output


class _InsteadOfForward:
    """A function that a module runs as its forward, until removed; its hooks stay."""

    def __init__(self, module: nn.Module, function: Callable[[Tensor], Any]) -> None:
        self._module = module
        vars(module)["forward"] = lambda input: function(input)

    def remove(self) -> None:
        """Give the module its class's forward back."""
        vars(self._module).pop("forward", None)


def _num_bytes(owner: _Owner) -> int:
    return sum(s.parameter.numel() * s.parameter.element_size() for s in owner.slots)


def _take_small(owners: Sequence[_Owner]) -> list[_Slot]:
    """Take the slots of small weights from their owners, up to a part of the largest layer."""
    hooked = [owner for owner in owners if not owner.is_lookup]
    room = max(map(_num_bytes, hooked), default=0) // _SMALL_SHARE
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


def _find_owners(model: nn.Module, tensors: dict[nn.Parameter, int]) -> list[_Owner]:
    """The modules to hook: for each slot the nearest module that is called and reads it."""
    owners: dict[nn.Module, _Owner] = {}

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
        fixed = fixed or compiled or isinstance(module, ATOMIC) or _reads_children(module)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter in tensors:
                owner = owners.setdefault(holder, _Owner(holder))
                slot = _Slot(module, name, parameter, tensors[parameter], f"{path}{name}")
                first = next((s for s in owner.slots if s.parameter is parameter), None)
                if first is None:
                    owner.slots.append(slot)
                else:
                    owner.ties.append((slot, first))
        read = CHILDREN_READ.get(type(module).__name__, ())
        for name, child in module.named_children():
            visit(child, f"{path}{name}.", holder, fixed or name in read)

    seen: set[tuple[nn.Module, nn.Module | None]] = set()
    heads: set[nn.Module] = set()
    visit(model, "", model, False)
    return list(owners.values())


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


class _ReadWatch(TorchDispatchMode):
    """Raises when an operation reads the storage of a weight that should be seen perturbed."""

    def __init__(self, owners: Sequence[_Owner]) -> None:
        super().__init__()
        self._paths = {
            slot.parameter.untyped_storage().data_ptr(): slot
            for owner in owners
            for slot in owner.slots
            if slot.parameter.numel()
        }
        self._is_paused = False

    def pause_during(self, module: nn.Module) -> list[Any]:
        """Hooks that let a module read what it owns."""

        def pause(*_: Any) -> None:
            self._is_paused = True

        def go_on(*_: Any) -> None:
            self._is_paused = False

        return [
            module.register_forward_pre_hook(pause),
            module.register_forward_hook(go_on, always_call=True),
        ]

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if not self._is_paused:
            for value in tree_iter((args, kwargs)):
                if isinstance(value, Tensor) and value.layout == torch.strided:
                    slot = self._paths.get(value.untyped_storage().data_ptr())
                    if slot is not None:
                        raise SelfCheckError(
                            f"the weight {slot.path} of {type(slot.module).__name__} is read by "
                            f"{func} outside its module's call, so its zeroth-order estimate would "
                            "be wrong. Freeze it (a base_lr map of patterns that leaves it out), "
                            "or add the class of the module that reads it to "
                            "zofo.perturb.ATOMIC"
                        )
        return func(*args, **(kwargs or {}))
