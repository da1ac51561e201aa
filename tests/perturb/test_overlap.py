"""Weights that are computed ahead give the bits of a view without overlap.

The fake streams of the tests are as slow as a device may be.
"""

from __future__ import annotations

import contextlib
import functools
import warnings

import pytest
import torch
from rich.console import Console
from torch import nn

import zofo.perturb.overlap
import zofo.perturb.scratch
from tests.perturb.test_view import Nested
from tests.support.models import assert_same_bits, batch_for, bits, build, loss_of
from tests.support.streams import FakeStreams
from tests.support.trainers import trainer_for
from zofo import HybridOptimizer, param_groups
from zofo.config.checks import idle_options
from zofo.config.load import load_config
from zofo.optim.blocks import split_parameters
from zofo.perturb.overlap import Overlap, SideStream
from zofo.perturb.view import Perturbation
from zofo.run.train import train

CASES = [(a, b) for a in ("llama", "opt", "gpt2", "bert") for b in ("lora", "prefix")]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def streams(monkeypatch):
    """Give the CPU fake streams, as if it were a device with streams."""
    found, prepare = FakeStreams(), zofo.perturb.scratch.prepare

    def prepare_kernel(weights, outs, **options):
        run = prepare(weights, outs, **options)
        return lambda *point: found.launch(lambda: run(*point), weights, outs)

    monkeypatch.setattr(zofo.perturb.scratch, "prepare", prepare_kernel)
    monkeypatch.setattr(zofo.perturb.overlap, "streams_of", lambda device_type: found)
    monkeypatch.setattr(zofo.perturb.view, "streams_of", lambda device_type: found)
    return found


def view_of(model, parameters=None, **options):
    parameters = list(model.parameters()) if parameters is None else parameters
    return Perturbation(model, parameters, range(len(parameters)), seed=5, **options)


def both_views(model):
    return view_of(model), view_of(model, overlap=True)


def plainly(view, function, step=0):
    with torch.no_grad(), view.at(0.1, step=step):
        return function()


def evaluate(view, function, streams, *, step=0, self_check=False):
    """Evaluate the function under the race watch, and assert that no kernel is left running."""
    with torch.no_grad(), streams, view.at(0.1, step=step, self_check=self_check):
        result = function().clone()
    assert_nothing_is_under_way(view)
    return result


def assert_nothing_is_under_way(view):
    assert view._ahead._guess is None
    assert not view._ahead._side._stream.queue


def layers_of(num, width=8):
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(num)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("architecture", "adapter"), CASES)
def test_the_bits_are_those_of_a_view_without(streams, architecture, adapter, dtype):
    model = build(architecture, adapter, dtype=dtype).eval()
    base, batch = list(split_parameters(model).base.values()), batch_for(architecture)
    plain, ahead = view_of(model, base), view_of(model, base, overlap=True)
    before, num_forks = bits(model), []
    for step in range(3):
        expected = plainly(plain, lambda: loss_of(model, batch), step)
        num_forks.append(streams.num_forks)
        options = {"step": step, "self_check": step == 0}
        seen = evaluate(ahead, lambda: loss_of(model, batch), streams, **options)
        assert torch.equal(seen, expected)
        assert torch.isfinite(seen)
        assert_same_bits(bits(model), before)
    assert num_forks[1] == 0  # The first evaluation has no earlier order of layers to guess from.
    # Every later evaluation computes each layer but the first ahead.
    assert streams.num_forks - num_forks[2] == num_forks[2] > 5


@pytest.mark.parametrize("estimator", ["forward", "central"])
@pytest.mark.parametrize(("method", "adapter"), [("hybrid", "lora"), ("zo-ft", None)])
def test_training_is_the_same(streams, method, adapter, estimator):
    """Overlap changes no bit under dropout, with moving weights, or in the adapter's gradients."""
    models = [build("opt", adapter).train() for _ in range(2)]
    gradients = []
    for model, overlap in zip(models, (False, True), strict=True):
        optimizer = HybridOptimizer(
            param_groups(model, method, base_lr=1e-2, adapter_lr=1e-2),
            model,
            seed=3,
            estimator=estimator,
            num_directions=2,
            overlap=overlap,
        )
        batch = batch_for("opt")
        torch.manual_seed(0)
        for _ in range(3):
            with streams if overlap else contextlib.nullcontext():
                optimizer.step(lambda model=model, batch=batch: loss_of(model, batch))
                for p in model.parameters() if overlap else ():
                    # The watch did not see the update, which wrote these weights.
                    streams.touch([p], writes=True)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert streams.num_forks > 0
    assert_same_bits(bits(models[0]), bits(models[1]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert_nothing_is_under_way(optimizer.perturbation)


def test_two_buffers_of_the_largest_layer(streams):
    model, x = layers_of(5, 64), torch.randn(2, 64)
    plain, ahead = both_views(model)
    for step in range(3):
        plainly(plain, lambda: model(x))
        evaluate(ahead, lambda: model(x), streams, step=step)
    assert plain.scratch_bytes == plain.largest_layer_bytes == 64 * 64 * 4
    assert ahead.scratch_bytes == ahead.largest_layer_bytes == 2 * 64 * 64 * 4


def test_nested_tied_repeated_and_returned_weights(streams):
    model, x = Nested(), torch.randn(2, 4)
    plain, ahead = both_views(model)
    for step in range(3):
        expected = plainly(plain, lambda: model(x), step)
        assert torch.equal(evaluate(ahead, lambda: model(x), streams, step=step), expected)


def in_order(model, order, x):
    for i in order:
        x = model[i](x).tanh()
    return x


ORDERS = [
    [0, 1, 2, 3],
    [0, 1, 2, 3],
    [0, 2, 1, 3],  # Two layers are swapped.
    [0, 1, 1, 1, 2],  # One layer is called repeatedly.
    [1, 1, 2],
    [3, 2, 1, 0, 3, 2, 1, 0],  # All layers are called twice, backwards.
    [0],
    [],
    [2, 0, 1, 3],
    [0, 1, 3, 2, 0],
    [0, 1, 3, 2, 0],
]


def test_any_order_of_calls(streams):
    """Every order of calls gives the bits of a plain view.

    The layers differ in size, so the buffers grow while they are in use.
    """
    torch.manual_seed(0)
    model = nn.ModuleList([Wide(8, width) for width in (3, 40, 5, 100)])
    plain, ahead = both_views(model)
    x = torch.randn(2, 8)
    for step, order in enumerate(ORDERS):
        function = functools.partial(in_order, model, order, x)
        expected = plainly(plain, function, step)
        seen = evaluate(ahead, function, streams, step=step)
        assert torch.equal(seen, expected), order
    assert streams.num_forks > 10


class Wide(nn.Module):
    """A layer that reads its two weights itself."""

    def __init__(self, width, inner):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(width, inner)) for _ in range(2))

    def forward(self, x):
        return x @ self.up @ self.down.t()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_nothing_under_way(streams, error):
    model, x = layers_of(4), torch.randn(2, 8)
    plain, ahead = both_views(model)
    before, identities = bits(model), [id(p) for p in model.parameters()]
    evaluate(ahead, lambda: model(x), streams)
    for place in model:

        def explode(*_):
            raise error("inside the forward")

        handle = place.register_forward_hook(explode)
        with contextlib.suppress(error):
            evaluate(ahead, lambda: model(x), streams)
        handle.remove()
        assert_nothing_is_under_way(ahead)
        assert_same_bits(bits(model), before)
        assert [id(p) for p in model.parameters()] == identities
        expected = plainly(plain, lambda: model(x), 1)
        assert torch.equal(evaluate(ahead, lambda: model(x), streams, step=1), expected)


def test_an_interrupt_of_the_guess_itself(streams, monkeypatch):
    """An interrupt while a layer is computed ahead leaves nothing running.

    The interrupt comes after the launch, before the view has recorded it.
    """
    model, x = layers_of(3), torch.randn(2, 8)
    _, ahead = both_views(model)
    evaluate(ahead, lambda: model(x), streams)
    fork = SideStream.fork

    def interrupted(self, launch):
        fork(self, launch)
        raise KeyboardInterrupt

    monkeypatch.setattr(SideStream, "fork", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(ahead, lambda: model(x), streams)
    assert_nothing_is_under_way(ahead)


def test_a_device_that_has_failed_leaves_the_model_as_it_was(streams, monkeypatch):
    model, x = layers_of(3), torch.randn(2, 8)
    _, ahead = both_views(model)
    identities = [id(p) for p in model.parameters()]

    def fail(*_):
        raise RuntimeError("CUDA error")

    model[1].register_forward_hook(lambda *_: monkeypatch.setattr(SideStream, "join", fail))
    with pytest.raises(RuntimeError, match="CUDA error"):
        plainly(ahead, lambda: model(x))
    assert [id(p) for p in model.parameters()] == identities
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in (model[0], model[2]))


@pytest.mark.parametrize("how", ["elsewhere", "in place"])
def test_a_weight_that_changes_after_the_guess(streams, how):
    model, x = layers_of(3), torch.randn(2, 8)
    plain, ahead = both_views(model)
    evaluate(ahead, lambda: model(x), streams)

    def move(*_):
        weight = model[1].weight
        if how == "elsewhere":
            weight.data = weight.data + 1
        else:
            weight.add_(1)

    handle = model[0].register_forward_hook(move)
    # The watch is off here, because the view does not use what the side stream reads meanwhile.
    seen = plainly(ahead, lambda: model(x), 1)
    handle.remove()
    assert_nothing_is_under_way(ahead)
    assert torch.equal(seen, plainly(plain, lambda: model(x), 1))


def test_compiled_layers_alternate_too(streams):
    torch._dynamo.reset()
    model, x = layers_of(4), torch.randn(2, 8)
    for layer in model:
        layer.compile(backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo warns by itself.
        plain, ahead = both_views(model)
        for step in range(3):
            expected = plainly(plain, lambda: model(x), step)
            assert torch.equal(plainly(ahead, lambda: model(x), step), expected)
            assert_nothing_is_under_way(ahead)
    assert streams.num_forks == 2 * 3
    torch._dynamo.reset()


def without_fork(self, launch):
    with self._streams.stream(self._stream):
        launch()


def into_the_buffer_in_use(self, point, look_ahead=Overlap.look_ahead):
    self._called.append(self._called[-1])
    look_ahead(self, point)
    self._called.pop()


NO_JOIN = (SideStream, "join", lambda self: None)
IN_USE = (Overlap, "look_ahead", into_the_buffer_in_use)
NO_END = (Overlap, "end", lambda self, is_whole: setattr(self, "_expected", self._called))


@pytest.mark.parametrize(
    ("mistake", "is_watched"),
    [
        ((SideStream, "fork", without_fork), True),
        (NO_JOIN, True),
        (NO_JOIN, False),
        (IN_USE, True),
        (IN_USE, False),
        (NO_END, True),
    ],
)
def test_a_mistake_is_seen(streams, monkeypatch, mistake, is_watched):
    """The fake streams detect these mistakes, either as a race or as a wrong result."""
    model, x = layers_of(4), torch.randn(2, 8)
    plain, ahead = both_views(model)

    def train():
        for step, num_layers in enumerate((4, 4, 2, 4)):
            function = functools.partial(in_order, model, range(num_layers), x)
            expected = plainly(plain, function, step)
            with streams if is_watched else contextlib.nullcontext():
                assert torch.equal(plainly(ahead, function, step), expected), "other bits"
            streams.touch(list(model.parameters()), writes=is_watched)  # This stands for an update.

    train()
    monkeypatch.setattr(*mistake)
    message = "beside another stream" if is_watched else "other bits"
    with pytest.raises(AssertionError, match=message):
        train()


def test_without_streams_it_is_said_once_and_does_nothing():
    zofo.perturb.overlap._say_without_streams.cache_clear()
    model, x = layers_of(3), torch.randn(2, 8)
    plain, ahead = both_views(model)
    expected = plainly(plain, lambda: model(x))
    with pytest.warns(UserWarning, match="overlap has no effect on cpu") as caught:
        seen = [plainly(ahead, lambda: model(x)) for _ in range(2)]
    assert all(torch.equal(s, expected) for s in seen)
    assert [w.filename for w in caught] == [__file__]
    assert ahead.scratch_bytes == plain.scratch_bytes
    assert ahead.largest_layer_bytes == plain.largest_layer_bytes


def test_cuda_is_a_device_with_streams():
    """CUDA's streams have the functions that `SideStream` calls."""
    found = zofo.perturb.overlap.streams_of("cuda")
    assert all(callable(getattr(found, name)) for name in ("Stream", "current_stream", "stream"))
    assert callable(found.Stream.wait_stream)
    assert zofo.perturb.overlap.streams_of("mps") is None


def test_a_trainer_hands_it_on(streams, tmp_path):
    trainers = [trainer_for(tmp_path, overlap=overlap, max_steps=3) for overlap in (False, True)]
    for trainer in trainers:
        trainer.train()
    assert streams.num_forks > 0
    assert_same_bits(*(bits(trainer.model) for trainer in trainers))
    assert_nothing_is_under_way(trainers[1].hybrid_optimizer.perturbation)


def test_a_run_hands_it_on(streams, tmp_path, decoder_folder):
    rows = tmp_path / "rows.csv"
    lines = [f"film {i} is {('good', 'bad')[i % 2]},{i % 2}" for i in range(40)]
    rows.write_text("\n".join(["text,label", *lines]))
    task = ["task=classification", f"task.train={rows}", "task.num_train=16", "task.num_dev=4"]
    results = [
        train(
            load_config(
                overrides=[
                    *task,
                    f"model={decoder_folder}",
                    "task.num_test=8",
                    "steps=3",
                    f"overlap={overlap}",
                    f"output_dir={tmp_path / overlap}",
                ]
            ),
            console=Console(quiet=True),
        )
        for overlap in ("false", "true")
    ]
    assert streams.num_forks > 0
    assert results[0].after == results[1].after
    config = load_config(values={"method": "fo-peft", "overlap": True})
    assert any("overlap has no effect" in text for text in idle_options(config))


def test_the_estimate_without_weights_counts_the_second_buffer():
    model = layers_of(2).to("meta")
    plain, ahead = both_views(model)
    assert ahead.largest_layer_bytes == 2 * plain.largest_layer_bytes == 2 * 8 * 8 * 4


def test_off_by_default():
    model = layers_of(1)
    optimizer = HybridOptimizer(param_groups(model, "zo-ft", base_lr=1e-3), model)
    assert not view_of(model).overlap
    assert not optimizer.perturbation.overlap
