"""The perturbed view of a compiled model equals that of an eager model.

No graph is compiled again.
"""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch

from tests.perturb.test_view import really_perturbed, view_of
from tests.support.models import assert_same_bits, batch_for, bits, build, loss_of
from tests.support.trainers import history, trainer_for
from zofo.errors import UserError
from zofo.optim.blocks import split_parameters
from zofo.optim.methods import param_groups
from zofo.optim.optimizer import HybridOptimizer
from zofo.perturb.view import SelfCheckError

pytestmark = [
    # A model that is compiled as a whole warns of its copy. A test below asserts this warning.
    pytest.mark.filterwarnings("ignore:.* is compiled as a whole:UserWarning"),
    # Dynamo reads the gradient of every tensor.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def layers_of(model):
    return model.get_base_model().model.layers


def one_layer(adapter="lora", **options):
    """Return a decoder of one layer. Tracing a layer takes a second."""
    model = build("llama", adapter, **options)
    del layers_of(model)[1:]
    return model


def wrapped(model, backend):
    return torch.compile(model, backend=backend)


def in_place(model, backend):
    model.compile(backend=backend)
    return model


def base_in_place(model, backend):
    model.get_base_model().compile(backend=backend)
    return model


def by_layer(model, backend):
    for layer in layers_of(model):
        layer.compile(backend=backend)
    return model


def wrapped_layers(model, backend):
    layers = layers_of(model)
    for i in range(len(layers)):
        layers[i] = torch.compile(layers[i], backend=backend)
    return model


def by_forward(model, backend):
    model.forward = torch.compile(model.forward, backend=backend)
    return model


def rarely(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


MORE = [base_in_place, wrapped_layers, by_forward]
WAYS = [wrapped, in_place, by_layer, *map(rarely, MORE)]


@pytest.mark.parametrize(
    ("way", "adapter"),
    [
        (by_layer, "lora"),
        (wrapped, "lora"),
        (base_in_place, "prompt"),  # peft looks words up outside the base's graph.
        *(rarely(way, "lora") for way in (in_place, *MORE)),
        *(rarely(way, "prompt") for way in (wrapped, in_place, by_layer)),
    ],
)
def test_a_perturbed_compiled_forward_is_that_of_a_perturbed_copy(way, adapter):
    """The bits agree, because the backend `aot_eager` runs the kernels of eager mode."""
    model = (build("llama", adapter) if way is by_layer else one_layer(adapter)).eval()
    batch, before = batch_for("llama"), bits(model)
    twin = really_perturbed(model, 1e-2, step=3)
    compiled = way(model, "aot_eager")
    view = view_of(compiled)
    with torch.no_grad():
        plain = loss_of(compiled, batch)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for step in (3, 3, 4):
                with view.at(1e-2, step=step):
                    seen = loss_of(compiled, batch)
                assert torch.equal(seen, loss_of(twin, batch)) == (step == 3)
            with view.at(0.0, step=3):
                assert torch.equal(loss_of(compiled, batch), plain)
            assert torch.equal(loss_of(compiled, batch), plain)
    assert_same_bits({n.replace("_orig_mod.", ""): p for n, p in bits(compiled).items()}, before)


@pytest.mark.parametrize("way", WAYS)
def test_hybrid_steps_of_a_compiled_model_are_those_of_the_eager_one(way):
    model, twin = (one_layer(lora_dropout=0.3) for _ in range(2))
    runs = []
    for each in (twin, way(model, "aot_eager")):
        torch.manual_seed(5)
        optimizer = HybridOptimizer(
            param_groups(each, "hybrid", base_lr=1e-3, adapter_lr=1e-2), each, optimizer="AdamW"
        )
        losses = []
        for seed in range(3):
            batch = batch_for("llama", seed=seed)
            losses.append(float(optimizer.step(lambda b=batch, m=each: loss_of(m, b))))
        scalars = [update[0].projected_grad[0] for update in optimizer.trajectory.updates]
        runs.append((losses, scalars))
    # The forward passes have the bits of eager mode. The adapter's gradient is summed in another
    # order.
    ours, theirs = split_parameters(each), split_parameters(twin)
    assert ours.base_index == theirs.base_index
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-6)
    assert runs[1][1] == pytest.approx(runs[0][1], rel=1e-2)
    assert runs[1][0][0] == runs[0][0][0]
    assert runs[1][1][0] == runs[0][1][0] != 0
    for a, b in ((ours.base, theirs.base), (ours.adapter, theirs.adapter)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("error", [rarely(RuntimeError), KeyboardInterrupt])
@pytest.mark.parametrize("way", [rarely(wrapped), rarely(in_place), by_layer])
def test_an_exception_inside_a_compiled_forward_leaves_every_bit(way, error):
    model = build("llama", "lora")
    before, identities = bits(model), {n: id(p) for n, p in model.named_parameters()}

    def explode(*_):
        raise error("inside the forward")

    model.get_base_model().lm_head.register_forward_hook(explode)
    compiled = way(model, "eager")
    with torch.no_grad(), pytest.raises(error), view_of(compiled).at(1e-1, step=0):
        loss_of(compiled, batch_for("llama"))
    assert_same_bits(bits(model), before)
    assert {n: id(p) for n, p in model.named_parameters()} == identities
    with torch.no_grad(), pytest.raises(error):
        # The model is compiled as before, and nothing is wrapped.
        loss_of(compiled, batch_for("llama"))


def test_layers_compiled_after_the_optimizer_was_made_are_seen():
    model = build("llama", "lora").eval()
    batch, twin = batch_for("llama"), really_perturbed(model, 1e-2, step=3)
    view = view_of(model)
    by_layer(model, "aot_eager")
    with torch.no_grad():
        loss_of(model, batch)
        with view.at(1e-2, step=3):
            assert torch.equal(loss_of(model, batch), loss_of(twin, batch))
    largest = max(sum(p.numel() for p in layer.parameters()) for layer in layers_of(model))
    assert view.scratch_bytes <= 4 * (largest + 64 * len(list(layers_of(model)[0].parameters())))


def test_tied_weights_stay_tied_and_are_copied_once():
    model = build("llama", None).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    compiled = in_place(model, "eager")
    view, seen = view_of(compiled), []
    model.lm_head.register_forward_pre_hook(
        lambda *_: seen.append(model.lm_head.weight is model.model.embed_tokens.weight)
    )
    with torch.no_grad(), view.at(1e-2, step=0):
        loss_of(model, batch_for("llama"))
    assert seen == [True]
    weights = list(model.parameters())
    assert view.scratch_bytes <= 4 * sum(p.numel() + 64 for p in weights)


def compiled_outside(model):
    compiled = torch.compile(model, backend="eager")
    return lambda batch: loss_of(compiled, batch)


def compiled_loss(model):
    return torch.compile(lambda batch: loss_of(model, batch), backend="eager")


@pytest.mark.parametrize(
    ("make", "method", "evaluated_before"),
    [
        (compiled_outside, "hybrid", True),
        (compiled_loss, "zo-peft", False),
        rarely(compiled_outside, "zo-peft", True),
        rarely(compiled_outside, "hybrid", False),
        rarely(compiled_loss, "hybrid", True),
    ],
)
def test_a_graph_that_the_optimizer_does_not_know_of_is_refused(make, method, evaluated_before):
    model = one_layer()
    optimizer = HybridOptimizer(param_groups(model, method), model)
    loss, batch, before = make(model), batch_for("llama"), bits(model)
    if evaluated_before:
        with torch.no_grad():
            loss(batch)
    with pytest.raises(SelfCheckError, match=r"reads the weight \S+ unperturbed"):
        optimizer.step(lambda: loss(batch))
    assert_same_bits(bits(model), before)


@pytest.mark.parametrize("way", [rarely(wrapped), rarely(in_place), by_layer])
def test_both_losses_of_every_step_come_from_the_graphs(way):
    """Every loss of every step is computed by the compiled graphs.

    The self-check runs eagerly. Dynamo must not give up the code that it met during the check.
    """
    calls = []

    def backend(graph, _):
        return lambda *inputs: calls.append(1) or graph(*inputs)

    model = way(build("llama", "lora"), backend)
    optimizer = HybridOptimizer(param_groups(model, "hybrid"), model)
    counts = []
    for _ in range(3):
        calls.clear()
        optimizer.step(lambda: loss_of(model, batch_for("llama")))
        counts.append(len(calls))
    num_graphs = 2 if way is by_layer else 1
    # The first step evaluates the loss again, to see that it repeats.
    assert counts == [3 * num_graphs, 2 * num_graphs, 2 * num_graphs]


def test_a_model_compiled_as_a_whole_warns_of_its_copy_once():
    model = in_place(one_layer(), "eager")
    with pytest.warns(UserWarning, match=r"layer\.compile\(\)"):
        optimizer = HybridOptimizer(param_groups(model, "hybrid"), model)
    layered = by_layer(build("llama", "lora"), "eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".* is compiled as a whole")
        for _ in range(2):
            optimizer.step(lambda: 0 * loss_of(model, batch_for("llama")))
        HybridOptimizer(param_groups(model, "zo-peft"), model)
        view_of(layered)


@pytest.mark.parametrize("method", ["hybrid", rarely("zo-peft")])
def test_trainers_torch_compile_is_followed(tmp_path, method):
    shared = {"method": method, "max_steps": 3, "learning_rate": 1e-3}
    eager = trainer_for(tmp_path / "a", one_layer(lora_dropout=0.3), **shared)
    compiled = trainer_for(
        tmp_path / "b",
        one_layer(lora_dropout=0.3),
        torch_compile=True,
        torch_compile_backend="aot_eager",
        **shared,
    )
    for trainer in (eager, compiled):
        torch.manual_seed(1)
        trainer.train()
    for key in ("loss", "projected_grad"):
        assert history(compiled, key) == history(eager, key)
    assert all(history(compiled, "projected_grad"))
    assert_same_bits(bits(compiled.model), bits(eager.model))


@pytest.mark.parametrize("way", [wrapped, wrapped_layers])
def test_a_trainer_refuses_wrappers_that_would_change_names_in_checkpoints(tmp_path, way):
    with pytest.raises(UserError, match=r"module\.compile\(\)"):
        trainer_for(tmp_path, way(build("llama", "lora"), "eager"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor(dtype):
    """The kernels of inductor round differently, but both losses of a difference share them."""
    model = build("llama", "lora", dtype=dtype, lora_dropout=0.3)
    twin, batch = copy.deepcopy(model), batch_for("llama")
    by_layer(model, "inductor")
    scalars, losses = [], []
    for each in (model, twin):
        optimizer = HybridOptimizer(param_groups(each, "hybrid"), each, eps=1e-2)
        losses.append(float(optimizer.step(lambda m=each: loss_of(m, batch))))
        scalars.append(optimizer.last_step.projected_grad[0])
        if each is model:
            optimizer.options.eps = 1e-30
            torch.manual_seed(3)
            optimizer.step(lambda m=each: loss_of(m, batch))
            assert optimizer.last_step.projected_grad == (0.0,)
    # The dropout masks differ from those of eager mode.
    assert losses[0] == pytest.approx(losses[1], abs=0.1)
    assert all(scalars)
    assert isinstance(model, peft.PeftModel)
