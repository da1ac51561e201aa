"""One step of each method on the same weights and batch.

    name             step                                                          forwards
    forward          one forward without gradients                                 1
    fo-peft          forward, backward into the adapter, AdamW                     2
    hybrid           ours, forward difference; adapter by AdamW                    3
    hybrid-central   ours, central difference; adapter by AdamW                    4
    hybrid-overlap   hybrid, a layer perturbed while the one before it runs (CUDA) 3
    zo-ft            ours, forward difference: the loss and one perturbed loss     2
    zo-ft-central    ours, central difference: MeZO's estimate                     2
    mezo             MeZO as its authors' code does it: four passes of torch.normal 2
    naive-hybrid     fo-peft's step, then mezo's                                   4
    fo-ft            forward, backward into every weight, AdamW                    3
    fo-ft-fused      every weight moved by SGD inside the backward                 3

Forwards are forward-equivalents: a backward pass counts one for the adapter's gradients and two for
those of every weight. All contenders update the same weights, by a negligibly small learning rate.

References:
    Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", 2023, Algorithm 1.
    Its passes as in the authors' code (princeton-nlp/MeZO): w = w + scale · z · eps, a new tensor
    each time; last w = w − lr · (s · z + weight_decay · w), with its default weight decay of 0.
    Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources", 2023:
    the update fused into the backward.
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
"""Learning rate of every block: an update does all its work and has almost no effect."""
EPS: Final = 1e-3
WEIGHT_DECAY: Final = 0.0
"""MeZO's default; its code multiplies by it even though it is 0."""


class Contender:
    """One step of one method; the base class is a forward pass without gradients.

    Args:
        bench: model and batch.
        rate: learning rate of every block.
    """

    what = "one forward without gradients"
    forward_equivalents = 1
    trains: str | None = None
    """The block whose parameters require a gradient during the step."""
    uses_kernels = False
    has_adapter = True
    is_alone = False
    """No other contender in this process uses the weights."""

    def __init__(self, bench: Workbench, rate: float = RATE) -> None:
        self.bench, self.rate = bench, rate
        self.model: nn.Module = bench.adapted if self.has_adapter else bench.plain
        self.base = bench.base
        self.adapter = bench.adapter if self.has_adapter else []
        self.optimizer: Optimizer | None = None

    def loss(self) -> Tensor:
        """Of the batch."""
        return self.bench.loss(self.model)

    def enter(self) -> None:
        """Flag the parameters that this contender trains."""
        for block, parameters in (("base", self.base), ("adapter", self.adapter)):
            for parameter in parameters:
                parameter.requires_grad_(self.trains == block)

    def step(self) -> None:
        """One step."""
        with torch.no_grad():
            self.loss()

    def leave(self) -> None:
        """Free the gradients, so that the next contender does not carry them."""
        for parameter in (*self.base, *self.adapter):
            parameter.grad = None

    @property
    def state_bytes(self) -> int:
        """What the optimiser keeps between steps."""
        if self.optimizer is None:
            return 0
        return sum(
            value.numel() * value.element_size()
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )


class FirstOrder(Contender):
    """The usual step of PEFT."""

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

    def __init__(self, bench: Workbench, rate: float = RATE) -> None:
        super().__init__(bench, rate)
        self._handles: list[Any] = []

    def enter(self) -> None:
        """Hook the update onto the gradients."""
        super().enter()
        self._handles = [p.register_post_accumulate_grad_hook(self._move) for p in self.base]

    def step(self) -> None:
        """Forward and backward; the hooks do the rest."""
        self.loss().backward()

    def leave(self) -> None:
        """Remove the hooks, so that fo-ft keeps its gradients."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        super().leave()

    @torch.no_grad()
    def _move(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.add_(parameter.grad, alpha=-self.rate)
        parameter.grad = None


class Ours(Contender):
    """A step of `HybridOptimizer`."""

    what = "zofo: forward difference; adapter by AdamW"
    trains: str | None = "adapter"
    method = "hybrid"
    estimator: Estimator = "forward"
    forward_equivalents = get_method("hybrid").forwards_per_gradient + forwards_per_direction(
        "forward"
    )
    overlap = False
    uses_kernels = True

    def __init__(self, bench: Workbench, rate: float = RATE) -> None:
        super().__init__(bench, rate)
        self.optimizer = HybridOptimizer(
            param_groups(self.model, self.method, base_lr=rate, adapter_lr=rate),
            self.model,
            optimizer="AdamW",
            estimator=self.estimator,
            distribution=bench.settings.distribution,
            eps=EPS,
            self_check=False,  # of the first step alone
            overlap=self.overlap,
        )

    def step(self) -> None:
        """One step."""
        assert isinstance(self.optimizer, HybridOptimizer)
        self.optimizer.step(self.loss)


class OursCentral(Ours):
    """The same with a central difference."""

    what = "zofo: central difference; adapter by AdamW"
    estimator = "central"
    forward_equivalents = get_method("hybrid").forwards_per_gradient + forwards_per_direction(
        "central"
    )


class OursOverlap(Ours):
    """As `Ours`, with two scratch buffers and a second stream."""

    what = "hybrid, a layer perturbed while the one before it runs"
    overlap = True


class OursFull(Ours):
    """Every weight by forward differences, no adapter."""

    what = "zofo: forward difference, no adapter"
    method = "zo-ft"
    forward_equivalents = 1 + forwards_per_direction("forward")
    trains = None
    has_adapter = False


class OursFullCentral(OursFull):
    """MeZO's estimate with our kernels.

    The unperturbed loss, which a training loop evaluates for its log, is left out, as MeZO does.
    """

    what = "zofo: central difference, no adapter: MeZO's estimate"
    estimator = "central"
    forward_equivalents = forwards_per_direction("central")

    def step(self) -> None:
        """Two perturbed forwards, one update."""
        assert isinstance(self.optimizer, HybridOptimizer)
        self.optimizer.measure(self.loss, None, GeneratorState.capture())
        self.optimizer.step()


class Mezo(Contender):
    """MeZO as in its authors' code: the weights become θ + εz, θ − εz, θ, and the updated θ."""

    what = "MeZO as published: four passes of torch.normal"
    forward_equivalents = 2
    has_adapter = False

    def __init__(self, bench: Workbench, rate: float = RATE) -> None:
        super().__init__(bench, rate)
        self._homes: list[Tensor] = []
        self._generator = torch.Generator(bench.device)
        self._num_steps = 0

    def enter(self) -> None:
        """Remember the weights' storage, because every pass replaces their tensors."""
        super().enter()
        self._homes = [] if self.is_alone else [weight.data for weight in self.base]

    def leave(self) -> None:
        """Copy the weights back into their original storage."""
        super().leave()
        for weight, home in zip(self.base, self._homes, strict=not self.is_alone):
            weight.data = home.copy_(weight.data)

    @torch.no_grad()
    def step(self) -> None:
        """Two forwards, four passes over the weights."""
        self._num_steps += 1
        self._perturb(1)
        ahead = self.loss()
        self._perturb(-2)
        behind = self.loss()
        self._perturb(1)
        projected_grad = float(ahead - behind) / (2 * EPS)
        for weight, z in self._directions():
            estimate = projected_grad * z
            if weight.dim() > 1:  # neither bias nor norm
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
    """Hybrid as two separate steps, one after the other."""

    what = "fo-peft's step, then mezo's"
    forward_equivalents = FirstOrder.forward_equivalents + Mezo.forward_equivalents

    def __init__(self, bench: Workbench, rate: float = RATE) -> None:
        super().__init__(bench, rate)
        self._mezo = _MezoBesideAdapter(bench, rate)

    def enter(self) -> None:
        """As both do."""
        self._mezo.is_alone = self.is_alone
        self._mezo.enter()
        super().enter()

    def leave(self) -> None:
        """As both do."""
        super().leave()
        self._mezo.leave()

    def step(self) -> None:
        """First order, then zeroth."""
        super().step()
        self._mezo.step()


KINDS: Final[Mapping[str, type[Contender]]] = {
    "forward": Contender,
    "fo-peft": FirstOrder,
    "hybrid": Ours,
    "hybrid-central": OursCentral,
    "hybrid-overlap": OursOverlap,
    "zo-ft": OursFull,
    "zo-ft-central": OursFullCentral,
    "mezo": Mezo,
    "naive-hybrid": NaiveHybrid,
    "fo-ft": FullFirstOrder,
    "fo-ft-fused": FusedFirstOrder,
}
"""In the order of `zofo.bench.settings.CONTENDERS`."""
