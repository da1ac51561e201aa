"""Rewards in Trainer's loop: what each block follows, resuming, failures and refusals."""

from __future__ import annotations

import copy
import json
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset

from tests.support.models import assert_same_bits, bits, enliven
from tests.support.trainers import arguments, history, untimed_logs
from zofo.errors import UserError
from zofo.models.adapters import create_adapter
from zofo.models.loading import load_model
from zofo.optim.blocks import split_parameters
from zofo.optim.methods import param_groups
from zofo.optim.optimizer import HybridOptimizer
from zofo.rewards.options import RewardOptions
from zofo.trainer.answers import Answered, RewardSource
from zofo.trainer.mixin import HybridTrainer
from zofo.trainer.sources import SampleAnswers

PROMPTS = [
    {"prompt": text, "wanted": wanted}
    for text, wanted in (
        ("the film is", "e"),
        ("a dull, lifeless and badly acted mess", "a"),
        ("great", "e"),
        ("What is the capital of", "t"),
        ("It was", "s"),
    )
]
OPTIONS = RewardOptions(num_answers=3, batch_size=2, max_new_tokens=5)


def counts(prompts, completions, wanted):
    """How often the wanted letter is in the answer."""
    return [float(c.count(w)) for c, w in zip(completions, wanted, strict=True)]


class Examples(Dataset):
    """Texts of one length, which the adapter learns."""

    def __init__(self, tokenizer, num=10):
        ids = [tokenizer(f"row {i} is fine and good")["input_ids"][:6] for i in range(num)]
        self.ids = torch.tensor(ids)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        ids = self.ids[i]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.fixture(scope="module")
def loaded(decoder_folder):
    """A lively model with an adapter, and its tokenizer."""
    model, tokenizer = load_model(decoder_folder)
    enliven(model)
    return create_adapter(model, "lora", tokenizer=tokenizer), model, tokenizer


def model_of(loaded, method):
    """A fresh copy: of the model with its adapter, or without."""
    adapted, _, tokenizer = loaded
    adapted = copy.deepcopy(adapted)
    return (adapted.unload() if method == "zo-ft" else adapted), tokenizer


def trainer_of(
    folder, loaded, method="hybrid", *, reward=OPTIONS, funcs=counts, rows=PROMPTS, **changes
):
    model, tokenizer = model_of(loaded, method)
    options = {"eps": 3e-2, "base_lr": 1e-2, "self_check": True, "max_steps": 4} | changes
    return HybridTrainer(
        model=model,
        args=arguments(folder, method=method, **options),
        train_dataset=None if method == "zo-ft" else Examples(tokenizer),
        processing_class=tokenizer,
        reward_funcs=funcs,
        reward_dataset=rows,
        reward=reward,
    )


def original_of(loaded, method="hybrid"):
    return model_of(loaded, method)[0]


@pytest.mark.parametrize("method", ["hybrid", "zo-ft"])
@pytest.mark.parametrize("estimator", ["forward", "central"])
def test_the_base_follows_the_rewards_and_is_replayed(tmp_path, loaded, method, estimator):
    trainer = trainer_of(tmp_path, loaded, method, estimator=estimator)
    trainer.train()
    base, before = (
        split_parameters(trainer.model).base,
        split_parameters(original_of(loaded, method)).base,
    )
    assert any(not torch.equal(base[name], before[name]) for name in base)
    trainer.trajectory.replay(before)
    assert_same_bits(dict(base), dict(before))
    update = trainer.trajectory.updates[0][0]
    assert len(update.projected_grad) == OPTIONS.num_answers * OPTIONS.batch_size
    rewards = history(trainer, "reward")
    assert len(rewards) == 4
    assert all(map(math.isfinite, rewards))
    assert max(history(trainer, "answers_differ")) > 0
    if method == "zo-ft":
        assert history(trainer, "loss")[0] == pytest.approx(-rewards[0], abs=1e-4)
        per_step = trainer.forward_equivalents / 4
        assert per_step > OPTIONS.num_answers * (2 if estimator == "central" else 1)


def test_a_rate_of_zero_leaves_exactly_fo_peft(tmp_path, loaded):
    hybrid = trainer_of(tmp_path / "a", loaded, base_lr=0.0)
    plain = HybridTrainer(
        model=original_of(loaded),
        args=arguments(tmp_path / "b", method="fo-peft", max_steps=4),
        train_dataset=Examples(loaded[2]),
        processing_class=loaded[2],
    )
    hybrid.train()
    plain.train()
    assert_same_bits(bits(hybrid.model), bits(plain.model))
    assert history(hybrid, "loss") == history(plain, "loss")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_equals_a_bare_loop(tmp_path, loaded, accumulation):
    trainer = trainer_of(
        tmp_path,
        loaded,
        "zo-ft",
        rows=PROMPTS[:4],  # so that no epoch ends within a step
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="constant",
    )
    trainer.train()
    model, tokenizer = model_of(loaded, "zo-ft")
    optimizer = HybridOptimizer(
        param_groups(model, "zo-ft", base_lr=1e-2),
        model,
        eps=3e-2,
        seed=trainer.args.seed,
        distribution="rank-one",
        directions_per_step="rows",
    )
    source = RewardSource(PROMPTS[:4], counts, tokenizer, OPTIONS, seed=trainer.args.seed)
    for step in range(4):
        for i in range(accumulation):
            number, weight = step * accumulation + i, 1 / accumulation
            population = source.population(model, number, weight=weight)
            optimizer.measure(None, None, zeroth_loss=population)
        optimizer.step()
    assert_same_bits(bits(trainer.model), bits(model))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_mean_reward_of_unperturbed_answers_rises(loaded, seed):
    """The share of the letter e, from 0.01, in 60 steps of antithetic pairs."""
    model, tokenizer = model_of(loaded, "zo-ft")

    def share(prompts, completions):
        return [text.count("e") / max(len(text), 1) for text in completions]

    prompts = [{"prompt": text} for text in ("the film is", "great", "What is it", "an actor")]
    options = RewardOptions(num_answers=8, batch_size=4, max_new_tokens=6)
    source = RewardSource(prompts, share, tokenizer, options, seed=seed)
    optimizer = HybridOptimizer(
        param_groups(model, "zo-ft", base_lr=3e-3),
        model,
        eps=3e-2,
        seed=seed,
        estimator="central",
        distribution="rank-one",
        directions_per_step="rows",
    )
    before = sum(source.answer_all(model).rewards)
    for step in range(60):
        optimizer.step(zeroth_loss=lambda i=step: source.population(model, i))
    assert sum(source.answer_all(model).rewards) > before + 0.1 * len(prompts)


class Stops:
    """A reward that the user interrupts in the middle of a step."""

    def __init__(self, after):
        self.calls, self.after = 0, after

    def __call__(self, prompts, completions, wanted):
        self.calls += 1
        if self.calls > self.after:
            raise KeyboardInterrupt
        return counts(prompts, completions, wanted)


@pytest.mark.parametrize("method", ["hybrid", "zo-ft"])
def test_an_interrupted_run_continues_bit_for_bit_with_the_same_answers(tmp_path, loaded, method):
    reward = RewardOptions(num_answers=3, batch_size=2, max_new_tokens=5, temperature=1.0)
    options = {"estimator": "central", "reward": reward, "save_strategy": "steps", "save_steps": 1}
    whole = trainer_of(tmp_path / "whole", loaded, method, **options)
    whole.train()
    # Of the two sides of a pair, the second of the third step is not scored.
    broken = trainer_of(tmp_path / "broken", loaded, method, funcs=Stops(5), **options)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = trainer_of(tmp_path / "broken", loaded, method, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_bits(bits(whole.model), bits(resumed.model))
    assert untimed_logs(whole) == untimed_logs(resumed)
    answers = [(tmp_path / name / "answers.jsonl").read_text() for name in ("whole", "broken")]
    assert answers[0] == answers[1]
    steps = [json.loads(line)["step"] for line in answers[0].splitlines()]
    assert sorted(set(steps)) == [1, 2, 3, 4]


def test_answers_do_not_depend_on_the_memory_that_they_may_take(tmp_path, loaded):
    def texts(memory_gib):
        reward = RewardOptions(
            num_answers=3, batch_size=2, max_new_tokens=5, temperature=1.0, memory_gib=memory_gib
        )
        trainer = trainer_of(tmp_path, loaded, "zo-ft", reward=reward, max_steps=1)
        trainer.train()
        return trainer._rewards.last.texts

    assert texts(2.0) == texts(1e-9)


def test_rewards_that_fail_are_left_out_and_said_and_all_of_them_end_the_run(tmp_path, loaded):
    calls = []

    def fails(prompts, completions, **_):
        calls.append(len(completions))
        # Whole batches of the second step fail, and one row of the first.
        if len(calls) > 1 + OPTIONS.num_answers * OPTIONS.batch_size:
            return [math.nan] * len(completions)
        if len(completions) > 1:
            raise ValueError("not like this")
        return [1.0 * len(completions[0]) if len(calls) > 2 else None]

    trainer = trainer_of(
        tmp_path, loaded, "zo-ft", funcs=fails, save_strategy="no", logging_nan_inf_filter=False
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.train()
    text = " ".join(str(w.message) for w in said)
    assert "1 rows have a loss difference or a reward" in text
    assert "the reward fails gave nan" in text
    assert "step 1 did not move the base" in text
    assert trainer.state.global_step == 2
    assert (tmp_path / "checkpoint-2").is_dir()
    assert len(trainer.trajectory) == 1
    assert history(trainer, "answers_left_out") == [1.0, 6.0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "fo-peft"}, "no zeroth-order block"),
        ({"distribution": "gaussian"}, "rank-one"),
        ({"num_directions": 2}, "num_directions"),
        ({"base_batch_fraction": 0.5}, "base_batch_fraction"),
        ({"reward": RewardOptions(num_answers=0)}, "num_answers"),
        ({"reward": RewardOptions(max_new_tokens=10**6)}, "positions"),
        ({"funcs": "regex:("}, "regular expression"),
        ({"funcs": []}, "no reward"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, loaded, changes, words):
    with pytest.raises(UserError, match=words):
        trainer_of(tmp_path, loaded, **changes)


def test_a_resumed_run_keeps_answers_with_line_separators(tmp_path):
    path = tmp_path / "answers.jsonl"
    lines = [
        json.dumps({"step": step, "answer": "a\u2028b"}, ensure_ascii=False) for step in (1, 2)
    ]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    answered = Answered(["ask"], ["c\x85d"], [1.0])
    callback = SampleAnswers(path, SimpleNamespace(last=answered))
    state = SimpleNamespace(global_step=1)
    callback.on_train_begin(None, state, None)
    callback.on_log(SimpleNamespace(should_save=True), state, None, {"loss": 0.5})
    found = [json.loads(x) for x in path.read_text(encoding="utf-8").split("\n") if x]
    assert [entry["answer"] for entry in found] == ["a\u2028b", "c\x85d"]


@pytest.mark.parametrize("row", [{}, {"prompt": 3}, {"prompt": ""}, {"prompt": ["a"]}])
def test_a_row_without_a_prompt_is_refused(loaded, row):
    with pytest.raises(UserError, match="row 2"):
        RewardSource([PROMPTS[0], row], counts, loaded[2])


def test_chat_messages_are_answered_and_scored_as_messages(loaded):
    model, tokenizer = model_of(loaded, "hybrid")
    seen = []

    def reward(prompts, completions):
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    prompt = [{"role": "user", "content": "What is it?"}]
    source = RewardSource([{"prompt": prompt}], reward, tokenizer, OPTIONS)
    population = source.population(model, 0)
    population.score(population.respond(range(population.num_rows)))
    asked, answer = seen[0]
    assert asked == prompt
    assert answer == [{"role": "assistant", "content": source.last.texts[0]}]


def test_rewards_that_compare_nothing_are_warned_of_once(loaded):
    """A reward with differences in between is not."""
    model, tokenizer = model_of(loaded, "hybrid")
    constant = [True] * 12 + [False] + [True] * 4
    calls = iter(constant)

    def reward(prompts, completions):
        same = next(calls)
        return [0.3 if same else float(i) for i in range(len(prompts))]

    source = RewardSource(PROMPTS, reward, tokenizer, OPTIONS)
    population = source.population(model, 0)
    texts = ["yes"] * population.num_rows
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in constant:
            population.score(texts)
    assert ["same reward in 5 steps" in str(warning.message) for warning in said] == [True]
    calls = iter([True, True, True, True, False] * 3)
    source = RewardSource(PROMPTS, reward, tokenizer, OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(15):
            source.population(model, 0).score(texts)
