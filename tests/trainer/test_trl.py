"""Tests of the mixin with trl's trainers."""

from __future__ import annotations

import peft
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from tests.perturb.test_view import really_perturbed, view_of
from tests.support.models import VOCABULARY, assert_same_bits, batch_for, bits, build
from tests.support.trainers import SEED, history, plain_options
from zofo.errors import UserError
from zofo.optim.blocks import split_parameters
from zofo.optim.reshuffle import ReshufflingSampler
from zofo.trainer.mixin import HybridMixin, HybridOptions

NUM_ROWS = 12
OPTIONS = HybridOptions(base_lr=1e-3)


class HybridSFTTrainer(HybridMixin, SFTTrainer):
    pass


class HybridDPOTrainer(HybridMixin, DPOTrainer):
    pass


def tokenizer():
    words = ["<pad>", "<unk>", "<eos>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )


def completions():
    rows = [
        {"prompt": f"w{i} w{i + 1}", "completion": " ".join(f" w{j}" for j in range(i % 4 + 1))}
        for i in range(NUM_ROWS)
    ]
    return Dataset.from_list(rows)


def preferences():
    rows = [
        {"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2}", "rejected": f" w{i + 3} w1"}
        for i in range(NUM_ROWS)
    ]
    return Dataset.from_list(rows)


def sft(folder, model, *, cls=HybridSFTTrainer, hybrid=OPTIONS, **changes):
    own = {} if hybrid is None else {"hybrid": hybrid}
    settings = {"bf16": False, "gradient_checkpointing": False, **changes}
    peft_config = settings.pop("peft_config", None)
    return cls(
        model=model,
        args=SFTConfig(**plain_options(folder, **settings)),
        train_dataset=completions(),
        processing_class=tokenizer(),
        peft_config=peft_config,
        **own,
    )


@pytest.mark.parametrize("adapter", ["lora", "prompt", "prefix"])
def test_sft_trains_both_blocks(tmp_path, adapter):
    model = build("llama", adapter)
    before = bits(model)
    trainer = sft(tmp_path, model, gradient_accumulation_steps=2)
    trainer.train()
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters())
    assert len(trainer.trajectory) == 4


def test_sft_with_its_defaults_and_an_adapter_of_its_own_making(tmp_path):
    """SFT with its defaults moves the whole base.

    The defaults include autocast to bfloat16 and gradient checkpointing. The trainer makes the
    adapter from `peft_config`.
    """
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    model = build("llama", None)
    args = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, max_steps=3, report_to="none", disable_tqdm=True
    )
    trainer = HybridSFTTrainer(
        model=model,
        args=args,
        train_dataset=completions(),
        processing_class=tokenizer(),
        peft_config=config,
        hybrid=OPTIONS,
    )
    before = {n: p.clone() for n, p in split_parameters(trainer.model).base.items()}
    trainer.train()
    assert all(
        not torch.equal(before[n], p) for n, p in split_parameters(trainer.model).base.items()
    )


@pytest.mark.parametrize("estimator", ["forward", "central"])
def test_sft_counts_every_batch_once(tmp_path, estimator):
    """At base_lr = 0, entropy, accuracy and token counts equal those of plain SFT."""

    class Plain(SFTTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return ReshufflingSampler(NUM_ROWS, seed=SEED)

    models = build("llama", "lora"), build("llama", "lora")
    changes = {"gradient_accumulation_steps": 2, "logging_steps": 2, "optim": "adamw_torch"}
    options = HybridOptions(base_lr=0.0, num_directions=2, estimator=estimator)
    hybrid = sft(tmp_path / "a", models[0], hybrid=options, **changes)
    plain = sft(tmp_path / "b", models[1], cls=Plain, hybrid=None, **changes)
    hybrid.train()
    plain.train()
    assert_same_bits(bits(models[0]), bits(models[1]))
    for key in ("loss", "num_tokens", "entropy", "mean_token_accuracy"):
        assert history(hybrid, key) == history(plain, key)
        assert len(history(hybrid, key)) == 2


@pytest.mark.parametrize("method", ["zo-peft", "zo-ft"])
def test_sft_without_a_gradient(tmp_path, method):
    model = build("llama", "lora" if method == "zo-peft" else None)
    trainer = sft(tmp_path, model, hybrid=HybridOptions(method=method, base_lr=1e-3))
    trainer.train()
    assert len(history(trainer, "mean_token_accuracy")) == 4
    tokens = history(trainer, "num_tokens")
    assert tokens == sorted(tokens)


def test_sft_resumes_to_the_same_bits(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    whole, rest = build("llama", "lora"), build("llama", "lora")
    sft(tmp_path, whole, **changes).train()
    sft(tmp_path, rest, **changes).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_bits(bits(rest), bits(whole))


@pytest.mark.parametrize("adapter", [None, "lora", "prompt"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_fused_head_is_seen_perturbed(adapter, tied):
    """The head is perturbed where trl reads its weight.

    trl reads it in the model's forward, which peft calls without hooks.
    """
    with torch.random.fork_rng():
        model = build("llama", None)
        if not tied:
            model.config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        if adapter == "lora":
            config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
        else:
            config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = model if adapter is None else peft.get_peft_model(model, config)
    twin, batch = really_perturbed(model, 1e-2, step=3), batch_for("llama")
    for each in (model, twin):
        add_fused_lm_head(each if adapter is None else each.get_base_model())
    before = bits(model)
    with torch.no_grad():
        plain = model(**batch, fused_lm_head=True).loss
        with view_of(model).at(1e-2, step=3, self_check=True):
            seen = model(**batch, fused_lm_head=True).loss
        assert torch.equal(seen, twin(**batch, fused_lm_head=True).loss)
        assert seen != plain
    assert_same_bits(bits(model), before)


def dpo(folder, model, *, hybrid=OPTIONS, **changes):
    settings = {"bf16": False, "gradient_checkpointing": False, **changes}
    return HybridDPOTrainer(
        model=model,
        args=DPOConfig(**plain_options(folder, **settings)),
        train_dataset=preferences(),
        processing_class=tokenizer(),
        hybrid=hybrid,
    )


def test_dpo_needs_a_reference_that_does_not_move(tmp_path):
    with pytest.raises(UserError, match="precompute_ref_log_probs"):
        dpo(tmp_path, build("llama", "lora"))
    model = build("llama", "lora")
    before = bits(model)
    trainer = dpo(tmp_path, model, precompute_ref_log_probs=True)
    trainer.train()
    after = bits(model)
    assert all(not torch.equal(before[n], after[n]) for n in before)
    assert len(history(trainer, "rewards/margins")) == 4


def test_the_reference_adapter_of_dpo_stays_as_it_is(tmp_path):
    model = build("llama", "lora")
    trainer = dpo(tmp_path, model, hybrid=HybridOptions(method="zo-peft"), learning_rate=1e-3)
    before = bits(model)
    trainer.train()
    for name, parameter in bits(model).items():
        moves = "lora" in name and ".ref." not in name
        assert torch.equal(parameter, before[name]) != moves, name


def test_kto_needs_a_reference_that_does_not_move(tmp_path):
    class HybridKTOTrainer(HybridMixin, KTOTrainer):
        pass

    def kto(**changes):
        rows = [
            {"prompt": f"w{i}", "completion": f" w{i + 1} w{i + 2}", "label": i % 2 == 0}
            for i in range(NUM_ROWS)
        ]
        settings = {"bf16": False, "gradient_checkpointing": False, **changes}
        return HybridKTOTrainer(
            model=build("llama", "lora"),
            args=KTOConfig(**plain_options(tmp_path, **settings)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
            hybrid=OPTIONS,
        )

    with pytest.raises(UserError, match="precompute_ref_log_probs"):
        kto()
    trainer = kto(precompute_ref_log_probs=True)
    trainer.train()
    assert len(trainer.trajectory) == 4
