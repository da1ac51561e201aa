"""One step of each method on the same weights and batch.

    name             step                                                          forwards
    forward          one forward without gradients                                 1
    pass             every base weight read and written once, without noise        0
    fo-peft          forward, backward into the adapter, AdamW                     2
    hybrid           zofo, forward difference; adapter by AdamW                    3
    hybrid-central   zofo, central difference; adapter by AdamW                    4
    hybrid-overlap   hybrid, a layer perturbed while the one before it runs (CUDA) 3
    hybrid-rows      hybrid with a rank-one direction for each row                  3
    zo-ft            zofo, forward difference: the loss and one perturbed loss     2
    zo-ft-rows       zo-ft with a rank-one direction for each row                   2
    zo-ft-central    zofo, central difference: MeZO's estimate                     2
    mezo             MeZO as its authors' code does it: four passes of torch.normal 2
    naive-hybrid     fo-peft's step, then mezo's                                   4
    fo-ft            forward, backward into every weight, AdamW                    3
    fo-ft-fused      every weight moved by SGD inside the backward                 3

Forwards are forward-equivalents: a backward pass counts one for the adapter's gradients and two for
those of every weight. All contenders update the same weights, by a negligibly small learning rate.

References:
    Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", 2023, Algorithm 1. The
    passes follow the authors' code (princeton-nlp/MeZO): w = w + scale · z · eps, and at the end
    w = w − lr · (s · z + weight_decay · w). Each pass creates a new tensor.
    Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources", 2023:
    the update is fused into the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from zofo.bench.models import Workbench
from zofo.optim.estimator import Estimator, forwards_per_direction
from zofo.optim.generators import GeneratorState
from zofo.optim.methods import get_method, param_groups
from zofo.optim.optimizer import HybridOptimizer

RATE: Final = 1e-9
"""Learning rate of every block. An update costs its full time and has almost no effect."""
EPS: Final = 1e-3
WEIGHT_DECAY: Final = 0.0
"""The default of MeZO, whose code multiplies by it even if it is 0."""


class Contender:
    """One step of one method. The base class runs a forward pass without gradients."""

    what = "one forward without gradients"
    forward_equivalents = 1
    trains: str | None = None  # the block whose parameters require a gradient during the step
    uses_kernels = False  # whether the step runs zofo's noise kernels
    has_adapter = True
    is_alone = False  # whether no other contender in this process uses the weights

    def __init__(self, bench: Workbench, rate: float = RATE) -> None:
        self.bench, self.rate = bench, rate
        self.model: nn.Module = bench.adapted if self.has_adapter else bench.plain
        self.base = bench.base
        self.adapter = bench.adapter if self.has_adapter else []
        self.optimizer: Optimizer | None = None

    def loss(self) -> Tensor:
        """The loss of the batch: shape []."""
        return self.bench.loss(self.model)

    def enter(self) -> None:
        """Set `requires_grad` of every parameter as this contender needs it."""
        for block, parameters in (("base", self.base), ("adapter", self.adapter)):
            for parameter in parameters:
                parameter.requires_grad_(self.trains == block)

    def step(self) -> None:
        """Run the step."""
        with torch.no_grad():
            self.loss()

    def leave(self) -> None:
        """Free the gradients, so that the next contender does not carry them."""
        for parameter in (*self.base, *self.adapter):
            parameter.grad = None

    @property
    def state_bytes(self) -> int:
        """The size of the optimizer's state."""
        states = [] if self.optimizer is None else self.optimizer.state.values()
        return sum(v.nbytes for state in states for v in state.values() if isinstance(v, Tensor))


class WeightPass(Contender):
    """The least that an update of every weight costs, whatever it adds to them."""

    what = "every base weight read and written once, without noise"
    forward_equivalents = 0

    @torch.no_grad()
    def step(self) -> None:
        """Multiply each weight by 1 in place."""
        for weight in self.base:
            weight.mul_(1.0)


class FirstOrder(Contender):
    """The usual first-order step of PEFT."""

    what = "forward, backward into the adapter, AdamW"
    forward_equivalents = get_method("fo-peft").forwards_per_gradient
    trains = "adapter"

    def __init__(self, bench: Workbench, rate: float = RATE) -> None:
        super().__init__(bench, rate)
        trained = self.adapter if self.trains == "adapter" else self.base
        self.optimizer = AdamW(trained, lr=rate)

    def step(self) -> None:
        """Forward, backward, AdamW."""
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()


class FullFirstOrder(FirstOrder):
    """Full fine-tuning."""

    what = "forward, backward into every weight, AdamW"
    forward_equivalents = get_method("fo-ft").forwards_per_gradient
    trains = "base"
    has_adapter = False


class FusedFirstOrder(Contender):
    """Full fine-tuning that updates each weight, and frees its gradient, during the backward."""

    what = "every weight moved by SGD inside the backward (as LOMO)"
    forward_equivalents = get_method("fo-ft").forwards_per_gradient
    trains = "base"
    has_adapter = False

    def enter(self) -> None:
        """Register a hook that updates each weight as soon as its gradient is complete."""
        super().enter()
        self._handles = [p.register_post_accumulate_grad_hook(self._move) for p in self.base]

    def step(self) -> None:
        """Run forward and backward; the hooks update the weights."""
        self.loss().backward()

    def leave(self) -> None:
        """Remove the hooks, so that fo-ft keeps its gradients."""
        for handle in self._handles:
            handle.remove()
        super().leave()

    @torch.no_grad()
    def _move(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.add_(parameter.grad, alpha=-self.rate)
        parameter.grad = None  # Frees the gradient before the backward reaches the next weight.


class Ours(Contender):
    """A step of `HybridOptimizer`."""

    what = "zofo: forward difference; adapter by AdamW"
    trains: str | None = "adapter"
    method = "hybrid"
    estimator: Estimator = "forward"
    forward_equivalents = FirstOrder.forward_equivalents + forwards_per_direction("forward")
    overlap = False
    by_rows = False
    uses_kernels = True

    def __init__(self, bench: Workbench, rate: float = RATE) -> None:
        super().__init__(bench, rate)
        self.optimizer = HybridOptimizer(
            param_groups(self.model, self.method, base_lr=rate, adapter_lr=rate),
            self.model,
            optimizer="AdamW",
            estimator=self.estimator,
            distribution="rank-one" if self.by_rows else bench.settings.distribution,
            directions_per_step="rows" if self.by_rows else 1,
            eps=EPS,
            self_check=False,  # The check would lengthen only the first step.
            overlap=self.overlap,
        )

    def step(self) -> None:
        """Run a complete step of the optimizer."""
        assert isinstance(self.optimizer, HybridOptimizer)
        self.optimizer.step(self.row_shares if self.by_rows else self.loss)

    def row_shares(self) -> Tensor:
        """Each row's share of the loss of the batch: shape [rows]."""
        return self.bench.row_shares(self.model)


class OursCentral(Ours):
    """A step of `HybridOptimizer` with a central difference."""

    what = "zofo: central difference; adapter by AdamW"
    estimator = "central"
    forward_equivalents = FirstOrder.forward_equivalents + forwards_per_direction("central")


class OursOverlap(Ours):
    """A step of `HybridOptimizer` with two scratch buffers and a second CUDA stream."""

    what = "hybrid, a layer perturbed while the one before it runs"
    overlap = True


class OursRows(Ours):
    """A step of `HybridOptimizer` with a rank-one direction for each row."""

    what = "hybrid with a rank-one direction for each row"
    by_rows = True


class OursFull(Ours):
    """A zeroth-order step of every weight by forward differences, without an adapter."""

    what = "zofo: forward difference, no adapter"
    method = "zo-ft"
    forward_equivalents = 1 + forwards_per_direction("forward")
    trains = None
    has_adapter = False


class OursFullRows(OursFull):
    """A zeroth-order step of every weight with a rank-one direction for each row."""

    what = "zo-ft with a rank-one direction for each row"
    by_rows = True


class OursFullCentral(OursFull):
    """MeZO's estimate with our kernels.

    The step evaluates no unperturbed loss, because MeZO evaluates none.
    """

    what = "zofo: central difference, no adapter: MeZO's estimate"
    estimator = "central"
    forward_equivalents = forwards_per_direction("central")

    def step(self) -> None:
        """Run two perturbed forwards and one update."""
        assert isinstance(self.optimizer, HybridOptimizer)
        self.optimizer.measure(self.loss, None, GeneratorState.capture())
        self.optimizer.step()


class Mezo(Contender):
    """MeZO as in its authors' code: the weights become θ + εz, θ − εz, θ and the updated θ."""

    what = "MeZO as published: four passes of torch.normal"
    forward_equivalents = 2
    has_adapter = False

    def __init__(self, bench: Workbench, rate: float = RATE) -> None:
        super().__init__(bench, rate)
        self._generator = torch.Generator(bench.device)
        self._num_steps = 0

    def enter(self) -> None:
        """Remember the weights' storage, because every pass replaces their tensors."""
        super().enter()
        # The first tensors add to the peak memory, so they are kept only for other contenders.
        self._homes = [] if self.is_alone else [weight.data for weight in self.base]

    def leave(self) -> None:
        """Copy the weights back into their original storage."""
        super().leave()
        for weight, home in zip(self.base, self._homes, strict=not self.is_alone):
            weight.data = home.copy_(weight.data)

    @torch.no_grad()
    def step(self) -> None:
        """Run two forwards and four passes over the weights."""
        self._num_steps += 1
        self._perturb(1)
        ahead = self.loss()
        self._perturb(-2)
        behind = self.loss()
        self._perturb(1)
        projected_grad = float(ahead - behind) / (2 * EPS)
        for weight, z in self._directions():
            estimate = projected_grad * z
            if weight.dim() > 1:  # Like MeZO's code, no decay of biases and norms.
                estimate = estimate + WEIGHT_DECAY * weight.data
            weight.data = weight.data - self.rate * estimate

    def _perturb(self, scale: float) -> None:
        for weight, z in self._directions():
            weight.data = weight.data + scale * z * EPS

    def _directions(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each weight with the step's direction z, generated again from the seed."""
        self._generator.manual_seed(self._num_steps)
        for weight in self.base:
            like: Any = {"dtype": weight.dtype, "device": weight.device}
            yield weight, torch.normal(0.0, 1.0, weight.shape, generator=self._generator, **like)


class _MezoBesideAdapter(Mezo):
    has_adapter = True


class NaiveHybrid(FirstOrder):
    """The hybrid step as two separate steps."""

    what = "fo-peft's step, then mezo's"
    forward_equivalents = FirstOrder.forward_equivalents + Mezo.forward_equivalents

    def __init__(self, bench: Workbench, rate: float = RATE) -> None:
        super().__init__(bench, rate)
        self._mezo = _MezoBesideAdapter(bench, rate)

    def enter(self) -> None:
        """Prepare both steps."""
        self._mezo.is_alone = self.is_alone
        self._mezo.enter()
        super().enter()

    def leave(self) -> None:
        """Clean up after both steps."""
        super().leave()
        self._mezo.leave()

    def step(self) -> None:
        """Run the first-order step, then the zeroth-order step."""
        super().step()
        self._mezo.step()


KINDS: Final[Mapping[str, type[Contender]]] = {
    "forward": Contender,
    "pass": WeightPass,
    "fo-peft": FirstOrder,
    "hybrid": Ours,
    "hybrid-central": OursCentral,
    "hybrid-overlap": OursOverlap,
    "hybrid-rows": OursRows,
    "zo-ft": OursFull,
    "zo-ft-rows": OursFullRows,
    "zo-ft-central": OursFullCentral,
    "mezo": Mezo,
    "naive-hybrid": NaiveHybrid,
    "fo-ft": FullFirstOrder,
    "fo-ft-fused": FusedFirstOrder,
}
"""Name -> class, in the order of `zofo.bench.settings.CONTENDERS`."""
