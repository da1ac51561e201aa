"""Each contender takes the step that its row in the table describes."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import zofo.perturb.overlap
from zofo.bench.contenders import EPS, RATE
from zofo.bench.contenders import KINDS as ALL_KINDS
from zofo.bench.models import Workbench, model_facts
from zofo.bench.settings import CONTENDERS, Settings, contenders_on, settings_from
from zofo.config.schema import RunConfig
from zofo.errors import UserError
from zofo.models.adapter_kinds import KINDS as ADAPTERS
from zofo.optim.blocks import split_parameters
from zofo.perturb.quantized import is_quantized
from zofo.run.cost import forward_equivalents

SETTINGS = Settings("random:llama-tiny", batch=2, length=8, device="cpu", threads=(1,))
KINDS = {name: ALL_KINDS[name] for name in contenders_on("cpu")}
BIG = 1e-2


@pytest.fixture
def bench():
    return Workbench(SETTINGS)


def copies(parameters):
    return [p.detach().clone() for p in parameters]


def differ(before, parameters):
    return any(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def one_step(contender):
    contender.enter()
    contender.step()
    contender.leave()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_contenders_on_a_quantised_base_share_its_codes(decoder_folder, quantization):
    pytest.importorskip("bitsandbytes")
    settings = dataclasses.replace(SETTINGS, model=decoder_folder, quantization=quantization)
    bench = Workbench(settings)
    codes = [p for p in bench.base if is_quantized(p)]
    before, adapter = copies(codes), bench.adapter
    plain = model_facts(dataclasses.replace(settings, quantization=None))
    assert model_facts(settings).base_bytes < plain.base_bytes
    assert model_facts(settings).num_parameters == plain.num_parameters
    for name in contenders_on("cpu", quantization):
        start = copies(adapter)
        one_step(KINDS[name](bench, BIG))
        assert differ(start, adapter) == (name.startswith(("hybrid", "fo-peft")))
    assert not differ(before, codes)


def test_what_a_quantised_base_cannot_run_is_refused():
    asked = {"quantization": "nf4", "device": "cpu", "threads": None}
    with pytest.raises(UserError, match=r"mezo cannot run on a base in nf4; choose from forward"):
        settings_from(only="mezo", **asked)
    with pytest.raises(UserError, match=r"random:llama-tiny has no weights that could be"):
        settings_from(only=None, model="random:llama-tiny", **asked)
    chosen = settings_from(only=None, **asked)
    assert "--only" not in chosen.arguments()
    assert "--quantization" in chosen.arguments()


def test_every_name_has_its_contender_in_order():
    assert tuple(ALL_KINDS) == CONTENDERS == contenders_on("cuda")


def test_overlap_is_the_hybrid_step_and_for_cuda(bench):
    assert set(ALL_KINDS) - set(KINDS) == {"hybrid-overlap"}
    other = Workbench(SETTINGS)
    one_step(KINDS["hybrid"](bench, BIG))
    contender = ALL_KINDS["hybrid-overlap"](other, BIG)
    assert contender.optimizer.perturbation.overlap
    assert contender.forward_equivalents == KINDS["hybrid"].forward_equivalents
    zofo.perturb.overlap._say_without_streams.cache_clear()
    with pytest.warns(UserWarning, match="no effect on cpu"):
        one_step(contender)
    assert not differ(copies(bench.base), other.base)


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("forward", ""),
        ("pass", ""),
        ("fo-peft", "adapter"),
        ("hybrid", "base adapter"),
        ("hybrid-central", "base adapter"),
        ("hybrid-rows", "base adapter"),
        ("zo-ft", "base"),
        ("zo-ft-rows", "base"),
        ("zo-ft-central", "base"),
        ("mezo", "base"),
        ("naive-hybrid", "base adapter"),
        ("fo-ft", "base"),
        ("fo-ft-fused", "base"),
    ],
)
def test_a_contender_moves_its_blocks_and_leaves_no_gradients(bench, name, moved):
    contender = KINDS[name](bench, BIG)
    base, adapter = copies(bench.base), copies(bench.adapter)
    one_step(contender)
    assert differ(base, bench.base) == ("base" in moved)
    assert differ(adapter, bench.adapter) == ("adapter" in moved)
    assert all(p.grad is None for p in (*bench.base, *bench.adapter))


@pytest.mark.parametrize(
    ("name", "forwards", "backward"),
    [
        ("forward", 1, 0),
        ("pass", 0, 0),
        ("fo-peft", 1, 1),
        ("hybrid", 2, 1),
        ("hybrid-central", 3, 1),
        ("hybrid-rows", 2, 1),
        ("zo-ft", 2, 0),
        ("zo-ft-rows", 2, 0),
        ("zo-ft-central", 2, 0),
        ("mezo", 2, 0),
        ("naive-hybrid", 3, 1),
        ("fo-ft", 1, 2),
        ("fo-ft-fused", 1, 2),
    ],
)
def test_forward_equivalents_are_the_forwards_made_and_the_backward(
    bench, name, forwards, backward
):
    contender = KINDS[name](bench)
    calls = []
    for tree in (bench.plain, bench.adapted):
        tree.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    one_step(contender)
    assert len(calls) == forwards
    assert contender.forward_equivalents == forwards + backward


@pytest.mark.parametrize(
    ("name", "method", "estimator"),
    [
        ("fo-peft", "fo-peft", "forward"),
        ("hybrid", "hybrid", "forward"),
        ("hybrid-central", "hybrid", "central"),
        ("hybrid-rows", "hybrid", "forward"),
        ("zo-ft", "zo-ft", "forward"),
        ("fo-ft", "fo-ft", "forward"),
    ],
)
def test_forward_equivalents_are_a_runs(name, method, estimator):
    adapter = {"type": "none" if method.endswith("-ft") else "lora"}
    config = RunConfig(method=method, estimator=estimator, adapter=adapter)
    assert KINDS[name].forward_equivalents == forward_equivalents(config, 1)


def test_both_trees_hold_the_same_base_weights(bench):
    adapted = split_parameters(bench.adapted)
    assert {id(p) for p in adapted.base.values()} == {id(p) for p in bench.base}
    assert not any("lora" in name for name, _ in bench.plain.named_parameters())
    assert torch.equal(bench.loss(bench.plain), bench.loss(bench.adapted))


@pytest.mark.parametrize("adapter", ["lora", "prompt"])
def test_the_shares_of_the_rows_sum_to_the_loss(adapter):
    bench = Workbench(dataclasses.replace(SETTINGS, adapter=adapter))
    shares = bench.row_shares(bench.adapted)
    assert shares.shape == (2,)
    torch.testing.assert_close(shares.sum(), bench.loss(bench.adapted))


def test_rows_have_directions_of_their_own_in_the_step_by_rows(bench):
    contender = KINDS["zo-ft-rows"](bench, BIG)
    one_step(contender)
    assert len(contender.optimizer.last_step.projected_grad) == SETTINGS.batch


def test_mezo_changes_the_weights_by_its_update_and_nothing_else(bench):
    contender = KINDS["mezo"](bench, BIG)
    before = copies(bench.base)
    generator = torch.Generator().manual_seed(1)
    noise = [torch.normal(0.0, 1.0, p.shape, generator=generator) for p in bench.base]

    def loss_at(scale):
        other = copy.deepcopy(bench.plain)
        with torch.no_grad():
            for weight, z in zip(other.parameters(), noise, strict=True):
                weight.add_(z, alpha=scale)
            return bench.loss(other).item()

    scalar = (loss_at(EPS) - loss_at(-EPS)) / (2 * EPS)
    assert abs(scalar) > 0.1
    one_step(contender)
    for old, new, z in zip(before, bench.base, noise, strict=True):
        torch.testing.assert_close(new, old - BIG * scalar * z, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["mezo", "naive-hybrid"])
def test_mezo_leaves_the_weights_in_their_places(bench, name):
    places = [weight.data_ptr() for weight in bench.base]
    contender = KINDS[name](bench, BIG)
    one_step(contender)
    assert [weight.data_ptr() for weight in bench.base] == places
    # If the contender runs alone, nothing else needs the old weights, and it keeps no second copy.
    contender.is_alone = True
    one_step(contender)
    assert [weight.data_ptr() for weight in bench.base] != places


def test_mezo_without_a_rate_leaves_the_weights_up_to_rounding(bench):
    before = copies(bench.base)
    one_step(KINDS["mezo"](bench, 0.0))
    for old, new in zip(before, bench.base, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-6, atol=1e-7)


def test_fused_full_fine_tuning_is_plain_sgd(bench):
    plain = Workbench(SETTINGS)
    contender = KINDS["fo-ft-fused"](bench, BIG)
    optimizer = torch.optim.SGD(plain.base, lr=BIG)
    for _ in range(3):
        one_step(contender)
        optimizer.zero_grad()
        plain.loss(plain.plain).backward()
        optimizer.step()
    torch.testing.assert_close(copies(bench.base), copies(plain.base))
    assert differ(copies(Workbench(SETTINGS).base), bench.base)


def test_the_fused_update_is_gone_when_another_has_its_turn(bench):
    one_step(KINDS["fo-ft-fused"](bench, BIG))
    before = copies(bench.base)
    frozen = KINDS["fo-ft"](bench, 0.0)
    one_step(frozen)
    assert not differ(before, bench.base)
    assert frozen.state_bytes > 0


def test_the_central_difference_without_the_loss_is_the_optimizers(bench):
    other = Workbench(SETTINGS)
    contender, whole = KINDS["zo-ft-central"](bench, BIG), KINDS["zo-ft-central"](other, BIG)
    one_step(contender)
    whole.enter()
    whole.optimizer.step(whole.loss)
    assert not differ(copies(other.base), bench.base)


def test_optimizer_states(bench):
    sizes = {}
    for name, kind in KINDS.items():
        contender = kind(bench)
        one_step(contender)
        sizes[name] = contender.state_bytes
    base = sum(4 * p.numel() for p in bench.base)
    adapter = sum(4 * p.numel() for p in bench.adapter)
    # AdamW keeps one float32 step count per tensor.
    counts = {"base": 4 * len(bench.base), "adapter": 4 * len(bench.adapter)}
    assert sizes["fo-ft"] == 2 * base + counts["base"]
    for name in ("fo-peft", "hybrid", "hybrid-central", "naive-hybrid"):
        assert sizes[name] == 2 * adapter + counts["adapter"]
    for name in ("forward", "zo-ft", "zo-ft-central", "mezo", "fo-ft-fused"):
        assert sizes[name] == 0


def test_in_a_benchmark_the_weights_hardly_move(bench):
    before = copies(bench.base)
    for kind in KINDS.values():
        one_step(kind(bench, RATE))
    for old, new in zip(before, bench.base, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name != "lora"])
def test_other_adapters(adapter):
    settings = Settings("random:llama-tiny", adapter, batch=2, length=8, device="cpu")
    bench = Workbench(settings)
    before = copies(bench.base)
    one_step(KINDS["hybrid"](bench, BIG))
    assert differ(before, bench.base)


def test_half_precision():
    settings = Settings(
        "random:llama-tiny", batch=2, length=8, device="cpu", dtype="bfloat16", threads=(1,)
    )
    bench = Workbench(settings)
    assert {p.dtype for p in bench.base} == {torch.bfloat16}
    for kind in KINDS.values():
        one_step(kind(bench))


def test_facts_are_those_of_the_loaded_model(bench):
    facts = model_facts(SETTINGS)
    assert facts.num_parameters == sum(p.numel() for p in bench.base)
    assert facts.num_adapter_parameters == sum(p.numel() for p in bench.adapter)
    assert facts.base_bytes == 4 * facts.num_parameters
    assert facts.largest_layer_bytes == 4 * 512 * 64  # The embedding is the largest layer.


@pytest.mark.parametrize(
    ("size", "millions"), [("llama-135m", (130, 140)), ("llama-1b", (1200, 1250))]
)
def test_sizes_of_the_random_models(size, millions):
    facts = model_facts(Settings(f"random:{size}"))
    assert millions[0] < facts.num_parameters / 1e6 < millions[1]


def test_rows_longer_than_the_model_takes_are_refused():
    with pytest.raises(UserError, match="at most 2048 tokens"):
        model_facts(Settings("random:llama-tiny", length=4096))
