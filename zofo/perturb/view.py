"""Evaluate the model at w + scale · v without writing to w.

A forward pre-hook on each owner of weights computes w + scale · v into a scratch buffer and puts
the result into the module's parameter table. The post-hook puts the parameter back. The parameter
is never written, so after an exception or Ctrl-C no weight has to be restored. One layer after
another uses the same scratch, so the extra memory is that of the largest layer. Small weights, such
as norms and biases, are computed together before the forward, into scratch of their own.

Under the distribution "rank-one", plain linear layers and embeddings need no perturbed weight: a
path beside the layer adds to its output (`zofo.perturb.side_path`). The other weights have
independent signs as above, one direction for the whole batch.

A module that reads a child's weight without calling the child would see the unperturbed weight.
Known modules of this kind (`ATOMIC`, and those that `zofo.perturb.owners` finds) swap their whole
subtree during their call. Modules in `CHILDREN_READ` swap only the named children. The self-check
(`zofo.perturb.self_check`) finds any other, such as the layers of many adapters, and
`Perturbation.checked` treats them as those in `CHILDREN_READ`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from torch import Tensor, nn

from zofo.noise.combine import Distribution, combine_rows
from zofo.perturb.compiled import (
    AroundCompiledCall,
    InsteadOfForward,
    compiled_modules,
    is_compiled,
    running_eagerly,
)
from zofo.perturb.overlap import Overlap, overlap_on, streams_of
from zofo.perturb.owners import ATOMIC as ATOMIC
from zofo.perturb.owners import CHILDREN_READ as CHILDREN_READ
from zofo.perturb.owners import Owner, find_owners, give_tiles, take_small
from zofo.perturb.quantized import refuse_compiled
from zofo.perturb.scratch import Scratch
from zofo.perturb.self_check import ReadWatch
from zofo.perturb.self_check import SelfCheckError as SelfCheckError
from zofo.perturb.shards import begin_anew, check_sharding, is_sharded, is_unit, reshard
from zofo.perturb.side_path import NotByRows, RowDirections, SidePath, cost_of, take_matrices
from zofo.perturb.slots import Slot

_T = TypeVar("_T")


class Perturbation:
    """The perturbed view of a model.

    Args:
        model: the model whose forward is perturbed.
        parameters: the perturbed weights.
        tensors: their tensor indices, which address directions, as in `Blocks.base_index`.
        seed: seed of the run, in [0, 2^64).
        distribution: "rademacher", "gaussian" or "rank-one".
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
        # What has no rank-one direction has independent signs.
        self._dense: Distribution = "rademacher" if distribution == "rank-one" else distribution
        self._scratch = Scratch(seed, self._dense)
        self._not_by_rows: set[int] = set()  # tensor indices
        self._paths: dict[Owner, SidePath] = {}
        self._directions = RowDirections()
        self._unfit: dict[int, tuple[Slot, Sequence[int]]] = {}  # of this evaluation
        self._entered: dict[Owner, None] = {}
        self._stack: list[Owner] = []
        self._point: tuple[float, int, int] | None = None
        self._ahead: Overlap | None = None
        self._watch: ReadWatch | None = None
        self._children_read = dict(CHILDREN_READ)
        self._is_checked = False
        self._is_sharded = any(map(is_sharded, parameters))
        self.follow(model)

    def follow(self, model: nn.Module) -> None:
        """Perturb the forward of another module that holds the weights, such as a wrapper."""
        self._model, self._modules = model, list(model.modules())
        self._compiled = compiled_modules(self._modules)
        check_sharding(model, self.parameters)
        refuse_compiled(self._compiled, self.parameters)
        reshard(model)
        owners = find_owners(model, self._tensors, ATOMIC, self._children_read)
        largest = max((o.num_bytes for o in owners if not o.is_lookup), default=0)
        if self.distribution == "rank-one":
            self._paths = take_matrices(owners, self.seed, self._not_by_rows)
        self._small = Owner(model, take_small(owners, largest))
        self._owners = [owner for owner in owners if owner.slots]
        self._scratch.forget_owners()
        self._ahead = None
        plain = [] if self._compiled else self._owners
        self._tile = give_tiles(plain, self.seed, self._dense)
        whole = sum(p.numel() for p in model.parameters())
        for owner in self._owners:
            # The owner of a compiled module has the weights of its whole subtree.
            size = sum(slot.parameter.numel() for slot in owner.slots)
            if is_compiled(owner.module) and 2 * size > whole:
                warnings.warn(
                    f"{type(owner.module).__name__} is compiled as a whole, so every perturbed "
                    f"evaluation needs a copy of its {size:,} moved weights. Compile each layer "
                    "to need a copy of only one: for layer in model.model.layers: layer.compile()",
                    stacklevel=2,
                )

    @property
    def is_compiled(self) -> bool:
        """Whether the model has parts under `torch.compile`."""
        return bool(self._compiled)

    @property
    def parameters(self) -> Collection[nn.Parameter]:
        """The perturbed weights."""
        return self._tensors.keys()

    @property
    def num_weights(self) -> int:
        """Number of perturbed weights."""
        return sum(p.numel() for p in self._tensors)

    @property
    def model(self) -> nn.Module:
        """The module whose forward is perturbed."""
        return self._model

    @property
    def rank_one(self) -> frozenset[int]:
        """Tensor indices of the weights whose directions are rank-one."""
        return frozenset(path.slot.tensor for path in self._paths.values())

    @property
    def forwards_per_evaluation(self) -> float:
        """Cost of an evaluation in forwards."""
        return cost_of(self._paths.values(), self._tensors)

    def only_rank_one(self, tensors: Collection[int]) -> None:
        """Give independent signs to all weights whose tensor index is not among `tensors`."""
        others = self.rank_one.difference(tensors)
        if others:
            self._not_by_rows |= others
            self.follow(self._model)

    @contextmanager
    def at(
        self,
        scale: float,
        *,
        step: int,
        direction: int = 0,
        self_check: bool = False,
        directions: RowDirections | None = None,
    ) -> Iterator[None]:
        """Inside the context, the model computes with w + scale · v[step, direction].

        Args:
            scale: eps, or −eps for the other side of a central difference.
            step: the optimizer step.
            direction: index of the direction.
            self_check: watch for reads of unperturbed weights.
            directions: those of the rows, for the distribution "rank-one"; None: `direction` for
                all rows.

        Raises:
            SelfCheckError: after such a read; it names the weight and its module.
            NotByRows: if a layer cannot tell the rows apart; `only_rank_one` can leave it out.
        """
        if self._point is not None:
            raise RuntimeError("the model is already being evaluated at a perturbed point")
        # A module that was compiled after the last evaluation changes the owners.
        if compiled_modules(self._modules) != self._compiled:
            self.follow(self._model)
        ahead = self._overlap()
        self._entered.clear()
        handles: list[Any] = []
        served = [Owner(path.owner.module, [path.slot]) for path in self._paths.values()]
        watched = [*self._owners, self._small, *served]
        self._watch = ReadWatch(watched, self._children_read) if self_check else None
        self._point = (scale, step, direction)
        self._directions = directions or RowDirections(direction)
        self._unfit.clear()
        is_whole = False
        try:
            # Layers begin at level 1, so no layer reuses the buffer of the small weights.
            self._swap_in(self._small, level=0)
            for owner, path in self._paths.items():
                handles += self._hook_path(owner, path)
            for owner in self._owners:
                handles += self._hooks(owner)
            if self._watch is None:
                yield
            else:
                handles += self._watch.find_in_calls_of(filter(is_unit, self._modules))
                with running_eagerly(), self._watch:
                    yield
                self._watch.check()
            if self._unfit:
                raise NotByRows(self._unfit)
            is_whole = True
        finally:
            for handle in handles:
                handle.remove()
            for owner in (*self._owners, self._small):
                owner.calls = 0
                owner.swap_out()
            self._stack.clear()
            self._watch = self._point = None
            if self._is_sharded:  # the next update would not change what FSDP still holds whole
                (reshard if is_whole else begin_anew)(self._model)
            if ahead is not None:  # last, because a failed device raises here as well
                ahead.end(is_whole=is_whole)

    def value_at(
        self, function: Callable[[], _T], scale: float, *, step: int, direction: int = 0
    ) -> _T:
        """The value of a function at w + scale · v; the first call checks itself (`checked`).

        Args:
            function: runs the model; may be called repeatedly.
            scale: as for `at`, and so are `step` and `direction`.
            step: the optimizer step.
            direction: index of the direction.

        Raises:
            SelfCheckError: as `checked`.
        """
        # The check would run compiled parts without their graphs, which rounds differently.
        is_wanted = not self._is_checked and not self.is_compiled

        def evaluate() -> _T:
            with self.at(scale, step=step, direction=direction, self_check=is_wanted):
                return function()

        value = self.checked(evaluate)
        self._is_checked = True
        return value

    def checked(self, evaluate: Callable[[], _T]) -> _T:
        """Evaluate with the self-check, again if a module is found to read another's weights.

        Such weights are swapped for the calls of the module that reads them, from then on.

        Args:
            evaluate: runs the model inside `at(..., self_check=True)`; may be called repeatedly.

        Raises:
            SelfCheckError: if a weight is read unperturbed nevertheless.
        """
        while True:
            try:
                return evaluate()
            except SelfCheckError as error:
                if not error.readers:
                    raise
                for name, paths in error.readers.items():
                    known = self._children_read.get(name, ())
                    self._children_read[name] = (*known, *paths)
            self.follow(self._model)

    @property
    def largest_layer_bytes(self) -> int:
        """Size of the scratch for the largest layer, twice with overlap, and the small weights."""
        layers = [o.num_bytes for o in self._owners if not o.is_lookup and o.tiles is None]
        kind = self._owners[0].slots[0].parameter.device.type if self._owners else "cpu"
        buffers = 2 if self.overlap and (kind == "meta" or streams_of(kind)) else 1
        return buffers * max(layers, default=0) + self._small.num_bytes + self._tile_bytes

    @property
    def scratch_bytes(self) -> int:
        """Size of the scratch buffers that stay allocated between evaluations."""
        return self._scratch.num_bytes + self._tile_bytes

    @property
    def _tile_bytes(self) -> int:
        return sum(tile.nbytes for tile in self._tile.values())

    @property
    def entered(self) -> Collection[Any]:
        """The owners whose weights the last evaluation perturbed."""
        return tuple(self._entered)

    def check_entered(self, expected: Collection[Any]) -> None:
        """Check that the last evaluation perturbed every owner that an eager one did.

        Args:
            expected: `entered` after the eager evaluation.

        Raises:
            SelfCheckError: if it did not; it names a weight that was read unperturbed.
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
        """Hook the owner's module; returns handles with a `remove` method."""
        module = owner.module
        if owner.is_lookup:
            # It replaces the output, so it must run before hooks that add to it (NEFTune's noise).
            hook = module.register_forward_hook(
                lambda _, args, kwargs, output: self._look_up(owner, args, kwargs, output),
                prepend=True,
                with_kwargs=True,
            )
            return [hook, *(self._watch.pause_during(module) if self._watch is not None else ())]
        if owner.tiles is not None:
            return [InsteadOfForward(module, functools.partial(self._multiply, owner))]
        enter, leave = functools.partial(self._enter, owner), functools.partial(self._leave, owner)
        if module._compiled_call_impl is not None:
            return [AroundCompiledCall(module, enter, leave)]
        # Inside the hooks of FSDP, which gather the module's weights and put the shards back.
        within = is_unit(module)
        return [
            module.register_forward_pre_hook(lambda *_: enter(), prepend=not within),
            module.register_forward_hook(
                lambda _, args, output: leave(output), prepend=within, always_call=True
            ),
        ]

    def _hook_path(self, owner: Owner, path: SidePath) -> list[Any]:
        """Hook the layer of a side path, ahead of hooks that add to its output."""

        def add(_: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            assert self._point is not None
            scale, step, _ = self._point
            self._note(owner)
            x = args[0] if args else next(iter(kwargs.values()))
            if not path.fits(x, self._directions):
                self._unfit[path.slot.tensor] = path.slot, x.shape
                return output
            with self._paused():
                return path.add(x, output, scale, step, self._directions)

        module = owner.module
        hook = module.register_forward_hook(add, prepend=True, with_kwargs=True)
        return [hook, *(self._watch.pause_during(module) if self._watch is not None else ())]

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
        if owner.calls == 0:  # another pre-hook raised before ours ran
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
        """The embedding's output at the perturbed point, from the rows that it reads."""
        if not isinstance(output, Tensor):  # the module failed
            return None
        assert self._point is not None
        scale, step, direction = self._point
        ids, slot = args[0] if args else kwargs["input"], owner.slots[0]
        self._note(owner)
        with self._paused():
            # Repeated rows are computed repeatedly, because finding the distinct ones would make
            # the host wait for the device.
            table = combine_rows(
                slot.present,
                ids.reshape(-1).long(),
                scale,
                seed=self.seed,
                step=step,
                tensor=slot.tensor,
                first_direction=direction,
                distribution=self._dense,
            )
            return table.view(*ids.shape, -1)  # [..., width], from [rows, width]

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
        # A graph calls no hooks of the modules inside it. Owners inside a compiled module do not
        # count, because only an eager run would note them.
        if not any(is_compiled(other.module) for other in self._stack):
            self._entered[owner] = None

    def _paused(self) -> Any:
        return self._watch.paused() if self._watch else nullcontext()

    def _swap_in(self, owner: Owner, level: int) -> None:
        assert self._point is not None
        swap = self._scratch.swap_of(owner, level)
        swap.compute(*self._point)
        swap.put_in(owner)

    def _overlap(self) -> Overlap | None:
        """Begin the overlap of an evaluation; None without one."""
        if not self.overlap or not self._owners:
            return None
        device = self._owners[0].slots[0].parameter.device
        if self._ahead is None or self._ahead.device != device:
            self._ahead = overlap_on(device, self._scratch)
        if self._ahead is not None:
            self._ahead.begin()
        return self._ahead
