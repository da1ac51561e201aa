"""The model seen at w + scale · v, without writing w.

A forward pre-hook on each module that owns moved weights computes w + scale · v into a scratch
buffer and puts that in the module's parameter table; the post-hook puts the parameter itself back.
The parameter is never written, so nothing has to be undone: an exception, Ctrl-C or a kill leaves
every bit where it was. Each layer's scratch is reused by the next: the extra memory is that of the
largest layer. Weights too small to be worth a hook (norms, biases) are computed all at once, before
the forward, into a scratch of their own.

A module that reads a child's weight directly (instead of calling the child) would see it as it was.
The known ones (`ATOMIC`, and what `zofo.perturb.owners` finds) are swapped as a whole subtree,
single children (`CHILDREN_READ`) for as long as their parent runs; any other is found by the
self-check (`zofo.perturb.self_check`), which names it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from zofo.noise.combine import Distribution, combine_rows
from zofo.perturb.compiled import AroundCompiledCall, compiled_modules, is_compiled, running_eagerly
from zofo.perturb.overlap import Overlap, overlap_on, streams_of
from zofo.perturb.owners import Owner, Slot, find_owners, take_small
from zofo.perturb.scratch import Scratch
from zofo.perturb.self_check import ReadWatch
from zofo.perturb.self_check import SelfCheckError as SelfCheckError
from zofo.perturb.tiles import ROWS, TiledLinear, is_tileable

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


class Perturbation:
    """The perturbed view of a model.

    Args:
        model: the model whose forward is to be seen perturbed.
        parameters: what is perturbed.
        tensors: their direction indices, as in `Blocks.base_index`.
        seed: run seed in [0, 2^64).
        distribution: "rademacher" or "gaussian".
        overlap: on CUDA, compute the next layer's weights while a layer runs, into a second
            scratch buffer. The bits are the same. Off by default: it has not been timed on a GPU.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        tensors: Sequence[int],
        *,
        seed: int,
        distribution: Distribution = "rademacher",
        overlap: bool = False,
    ) -> None:
        self.seed, self.distribution, self.overlap = seed, distribution, overlap
        self._tensors = dict(zip(parameters, tensors, strict=True))
        self._scratch = Scratch(seed, distribution)
        self._entered: dict[Owner, None] = {}
        self._stack: list[Owner] = []
        self._point: tuple[float, int, int] | None = None
        self._ahead: Overlap | None = None
        self._watch: ReadWatch | None = None
        self.follow(model)

    def follow(self, model: nn.Module) -> None:
        """Watch the calls of another module that holds the weights: accelerate wraps models."""
        self._model, self._modules = model, list(model.modules())
        self._compiled = compiled_modules(self._modules)
        owners = find_owners(model, self._tensors, ATOMIC, CHILDREN_READ)
        self._small = Owner(model, take_small(owners))
        self._owners = [owner for owner in owners if owner.slots]
        self._scratch.forget_owners()
        self._ahead = None
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
    def num_weights(self) -> int:
        """Weights that are perturbed."""
        return sum(p.numel() for p in self._tensors)

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
        if self._point is not None:
            raise RuntimeError("the model is already being evaluated at a perturbed point")
        if compiled_modules(self._modules) != self._compiled:
            self.follow(self._model)
        ahead = self._overlap()
        self._entered.clear()
        handles: list[Any] = []
        self._watch = ReadWatch([*self._owners, self._small]) if self_check else None
        self._point = (scale, step, direction)
        is_whole = False
        try:
            self._swap_in(self._small, level=0)
            for owner in self._owners:
                handles += self._hooks(owner)
            if self._watch is None:
                yield
            else:
                with running_eagerly(), self._watch:
                    yield
            is_whole = True
        finally:
            for handle in handles:
                handle.remove()
            for owner in (*self._owners, self._small):
                owner.calls = 0
                owner.swap_out()
            self._stack.clear()
            self._watch = self._point = None
            if ahead is not None:  # last: a device that has failed raises here, too
                ahead.end(is_whole=is_whole)

    @property
    def largest_layer_bytes(self) -> int:
        """Size of the scratch that the largest layer will need, with that of the small weights.

        With overlap the layer counts twice.
        """
        layers = [o.num_bytes for o in self._owners if not o.is_lookup and o.tiles is None]
        tiles = sum(t.numel() * t.element_size() for t in self._tile.values())
        kind = self._device.type if self._owners else "cpu"
        buffers = 2 if self.overlap and (kind == "meta" or streams_of(kind)) else 1
        return buffers * max(layers, default=0) + self._small.num_bytes + tiles

    @property
    def scratch_bytes(self) -> int:
        """Size of the scratch buffers held between evaluations."""
        tiles = sum(t.numel() * t.element_size() for t in self._tile.values())
        return self._scratch.num_bytes + tiles

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

    def _hooks(self, owner: Owner) -> list[Any]:
        """Watch the owner's calls; returns the handles."""
        module = owner.module
        if owner.is_lookup:
            # First among the hooks: another's noise on the output stays (NEFTune).
            hook = module.register_forward_hook(
                lambda _, args, kwargs, output: self._look_up(owner, args, kwargs, output),
                prepend=True,
                with_kwargs=True,
            )
            return [hook, *(self._watch.pause_during(module) if self._watch is not None else ())]
        if owner.tiles is not None:
            return [_InsteadOfForward(module, functools.partial(self._multiply, owner))]
        enter, leave = functools.partial(self._enter, owner), functools.partial(self._leave, owner)
        if module._compiled_call_impl is not None:
            return [AroundCompiledCall(module, enter, leave)]
        return [
            module.register_forward_pre_hook(lambda *_: enter(), prepend=True),
            module.register_forward_hook(lambda _, args, output: leave(output), always_call=True),
        ]

    def _enter(self, owner: Owner) -> None:
        owner.calls += 1
        if owner.calls > 1:
            return
        self._note(owner)
        self._stack.append(owner)
        with self._paused():
            if self._ahead is None or len(self._stack) > 1:
                self._swap_in(owner, level=len(self._stack))
                return
            assert self._point is not None
            self._ahead.swap_of(owner, self._point).put_in(owner)
            self._ahead.look_ahead(self._point)

    def _leave(self, owner: Owner, output: Any) -> Any:
        if owner.calls == 0:  # another pre-hook failed before ours ran
            return None
        owner.calls -= 1
        if owner.calls:
            return None
        with self._paused():
            safe = self._scratch.detach(output)
            owner.swap_out()
        self._stack.remove(owner)
        return None if safe is output else safe

    def _look_up(self, owner: Owner, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        """What the embedding returns at the perturbed point, from the rows that it reads."""
        if not isinstance(output, Tensor):  # the module failed
            return None
        assert self._point is not None
        scale, step, direction = self._point
        ids, slot = args[0] if args else kwargs["input"], owner.slots[0]
        self._note(owner)
        with self._paused():
            # A row is computed as often as it is read: to find the distinct ones would make the
            # host wait for the device.
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

    def _multiply(self, owner: Owner, x: Tensor) -> Any:
        module: Any = owner.module
        assert owner.tiles is not None
        assert self._point is not None
        with self._paused():
            if owner.calls == 0 and owner.tiles.serves(x, module.bias):
                self._note(owner)
                return owner.tiles(x, module.bias, *self._point)
        output = None
        self._enter(owner)
        try:
            output = nn.Linear.forward(module, x)
        finally:
            safe = self._leave(owner, output)
        return output if safe is None else safe

    def _note(self, owner: Owner) -> None:
        # What is called inside of a compiled module is called only while that runs eagerly.
        if not any(is_compiled(other.module) for other in self._stack):
            self._entered[owner] = None

    def _paused(self) -> Any:
        return self._watch.paused() if self._watch else nullcontext()

    def _swap_in(self, owner: Owner, level: int) -> None:
        assert self._point is not None
        swap = self._scratch.swap_of(owner, level)
        swap.compute(*self._point)
        swap.put_in(owner)

    @property
    def _device(self) -> torch.device:
        return self._owners[0].slots[0].parameter.device

    def _overlap(self) -> Overlap | None:
        """What computes ahead in the evaluation that begins, if anything does."""
        if not self.overlap or not self._owners:
            return None
        if self._ahead is None or self._ahead.device != self._device:
            self._ahead = overlap_on(self._device, self._scratch)
        if self._ahead is not None:
            self._ahead.begin()
        return self._ahead

    def _make_tiles(self) -> dict[torch.dtype, Tensor]:
        """Find the layers that are computed in tiles; returns the scratch that they share."""
        found: list[tuple[Owner, Slot]] = []
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


class _InsteadOfForward:
    """A function that a module runs as its forward, until removed; its hooks stay."""

    def __init__(self, module: nn.Module, function: Callable[[Tensor], Any]) -> None:
        self._module = module
        vars(module)["forward"] = lambda input: function(input)

    def remove(self) -> None:
        """Give the module its class's forward back."""
        vars(self._module).pop("forward", None)
