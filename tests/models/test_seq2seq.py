"""Encoder-decoder models work from the rows to the exported folder."""

from __future__ import annotations

import json

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from rich.console import Console
from typer.testing import CliRunner

from tests.support import zoo
from zofo.cli.app import app
from zofo.config.load import load_config
from zofo.console import quiet
from zofo.errors import UserError
from zofo.models.adapter_kinds import KINDS
from zofo.models.adapters import create_adapter
from zofo.models.loading import empty_model, head_of, load_model
from zofo.optim.methods import METHODS
from zofo.run.plan import make_plan
from zofo.run.train import train
from zofo.saved.artifact import load
from zofo.saved.export import export_model
from zofo.saved.inspect import inspect
from zofo.saved.verify import verify as checks_of
from zofo.scoring.evaluate import evaluate, predict_scores
from zofo.scoring.generate import Writer
from zofo.scoring.score import evaluate_artifact
from zofo.tasks.encode import Collator, Encoder
from zofo.tasks.losses import (
    candidate_scores,
    first_examples,
    objective_loss,
    objective_losses,
    token_scores,
)
from zofo.tasks.spec import Completion, Example, TaskSpec

QUIET = Console(quiet=True)
EXAMPLES = [
    Example("the film is", (" great", " a dull mess"), 0, "", 1),
    Example("a warm and clever story that never", (" bad", " terrible", " good"), 2, "", 2),
]
COMPLETIONS = [
    Completion((("the film", False), (" is great", True)), "", 1),
    Completion((("What is the capital of France?", False), ("Paris.", True)), "", 2),
]


def score_by_hand(model, tokenizer, prompt, written):
    """Return the mean log-likelihood of the decoder's target, computed one token at a time."""
    source = tokenizer(prompt, return_tensors="pt")
    target = tokenizer(text_target=written)["input_ids"]
    assert target[-1] == tokenizer.eos_token_id
    before, found = [model.config.decoder_start_token_id], []
    for token in target:
        logits = model(
            input_ids=source["input_ids"],
            attention_mask=source["attention_mask"],
            decoder_input_ids=torch.tensor([before]),
        ).logits[0, -1]
        found.append(logits.float().log_softmax(-1)[token])
        before.append(token)
    return torch.stack(found).mean()


def loaded(folder, adapter=None):
    model, tokenizer = load_model(folder, head="seq2seq")
    if adapter is not None:
        model = create_adapter(model, adapter, head="seq2seq", tokenizer=tokenizer)
    return model.eval(), tokenizer


def batch_of(tokenizer, examples):
    encoder = Encoder(tokenizer, head="seq2seq")
    return Collator(tokenizer.pad_token_id)([encoder(example) for example in examples])


# Tests of the models.


def test_the_head_follows_the_architecture(encoder_decoder_folder, decoder_folder, encoder_folder):
    assert head_of(encoder_decoder_folder) == "seq2seq"
    assert isinstance(loaded(encoder_decoder_folder)[0], hf.T5ForConditionalGeneration)
    empty = empty_model(encoder_decoder_folder, head="seq2seq")
    assert isinstance(empty, hf.T5ForConditionalGeneration)
    for folder, head, words in (
        (encoder_decoder_folder, "causal-lm", "an encoder-decoder; use it with head seq2seq"),
        (decoder_folder, "seq2seq", "no encoder-decoder; use it with head causal-lm"),
        (encoder_folder, "seq2seq", "no encoder-decoder; use it with head classification"),
    ):
        with pytest.raises(UserError, match=words):
            load_model(folder, head=head)
        with pytest.raises(UserError, match=words):
            empty_model(folder, head=head)


# Tests of the scores.


@pytest.mark.parametrize("adapter", [None, *KINDS])
@torch.no_grad()
def test_scores_are_mean_log_likelihoods_in_the_decoder(encoder_decoder_folder, adapter):
    model, tokenizer = loaded(encoder_decoder_folder, adapter)
    scores = candidate_scores(model, batch_of(tokenizer, EXAMPLES))
    assert scores.shape == (2, 3)
    for row, example in zip(scores, EXAMPLES, strict=True):
        expected = [
            score_by_hand(model, tokenizer, example.prompt, candidate.lstrip())
            for candidate in example.candidates
        ]
        assert torch.allclose(row[: len(expected)], torch.stack(expected), atol=1e-5)
        assert (row[len(expected) :] == -torch.inf).all()


@torch.no_grad()
def test_a_score_is_minus_transformers_loss(encoder_decoder_folder):
    model, tokenizer = loaded(encoder_decoder_folder)
    example = EXAMPLES[0]
    scores = candidate_scores(model, batch_of(tokenizer, [example]))[0]
    for score, candidate in zip(scores, example.candidates, strict=True):
        labels = tokenizer(text_target=candidate.lstrip(), return_tensors="pt")["input_ids"]
        source = tokenizer(example.prompt, return_tensors="pt")
        loss = model(
            input_ids=source["input_ids"], attention_mask=source["attention_mask"], labels=labels
        ).loss
        assert torch.allclose(score, -loss, atol=1e-6)


@torch.no_grad()
def test_the_loss_of_completions_is_transformers_own(encoder_decoder_folder):
    model, tokenizer = loaded(encoder_decoder_folder)
    row = COMPLETIONS[0]
    labels = tokenizer(text_target=" is great", return_tensors="pt")["input_ids"]
    source = tokenizer("the film", return_tensors="pt")["input_ids"]
    expected = model(input_ids=source, labels=labels).loss
    assert torch.allclose(objective_loss(model, batch_of(tokenizer, [row])), expected, atol=1e-6)


@torch.no_grad()
def test_padding_and_neighbours_change_no_score(encoder_decoder_folder):
    model, tokenizer = loaded(encoder_decoder_folder, "prefix")
    together = candidate_scores(model, batch_of(tokenizer, EXAMPLES))
    alone = candidate_scores(model, batch_of(tokenizer, EXAMPLES[:1]))
    assert torch.allclose(together[:1, :2], alone, atol=1e-6)
    both = token_scores(model, batch_of(tokenizer, COMPLETIONS)).log_likelihood
    one = token_scores(model, batch_of(tokenizer, COMPLETIONS[:1])).log_likelihood
    assert torch.allclose(both[: len(one)], one, atol=1e-6)


@pytest.mark.parametrize("rows", [EXAMPLES, COMPLETIONS])
@torch.no_grad()
def test_a_part_of_a_batch_is_its_first_examples(encoder_decoder_folder, rows):
    model, tokenizer = loaded(encoder_decoder_folder)
    batch = batch_of(tokenizer, rows)
    part, share = first_examples(batch, 1)
    num_rows = len(rows[0].candidates) if rows is EXAMPLES else 1
    assert share == num_rows / len(batch["input_ids"])
    shares = objective_losses(model, batch)[1]
    assert torch.allclose(objective_losses(model, part)[1], shares[:1], atol=1e-6)


def test_a_long_prompt_loses_its_beginning_and_a_long_answer_is_refused(encoder_decoder_folder):
    tokenizer = loaded(encoder_decoder_folder)[1]
    encoder = Encoder(tokenizer, head="seq2seq", max_length=6)
    encoded = encoder(Example("a dull film " * 9 + "great", (" a", " b"), 0, "", 1))
    assert list(encoded.rows[0]) == tokenizer("a dull film " * 9 + "great")["input_ids"][-6:]
    assert encoded.length == 6
    with pytest.raises(UserError, match=r"row 7: .* max_length is 6; raise"):
        encoder(Example("a", ("xyzxyzxyzxyz", "b"), 0, "", 7))
    with pytest.raises(UserError, match="takes no turns"):
        encoder(Completion((("a", False), ("b", True)), "", 1, is_rendered=True))


def test_a_tokenizer_that_ends_no_text_gets_its_end_token():
    from tests.support.hub_folders import make_tokenizer

    tokenizer = make_tokenizer()
    encoded = Encoder(tokenizer, head="seq2seq")(EXAMPLES[0])
    assert all(output[-1] == tokenizer.eos_token_id for output in encoded.outputs)
    assert encoded.outputs[0][:-1] == tuple(tokenizer("great")["input_ids"])


# Tests of whole runs.


@pytest.fixture(scope="module")
def trained(tmp_path_factory, encoder_decoder_folder):
    """Return a function that trains each (method, adapter, task) once and gives its folder."""
    root = tmp_path_factory.mktemp("runs")
    lines, pairs = ["text,label"], []
    for i in range(80):
        word, label = (("great warm", "good"), ("dull mess", "bad"))[i % 2]
        lines.append(f"the film number {i} is a {word} story,{label}")
        pairs.append({"prompt": f"the film number {i} is {word}", "completion": f"{label} film"})
    (root / "classification.csv").write_text("\n".join(lines) + "\n")
    (root / "completion.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")

    def values(method="hybrid", adapter="lora", task="classification"):
        return [
            f"model={encoder_decoder_folder}",
            f"method={method}",
            *([f"adapter={adapter}"] if METHODS[method].needs_adapter else []),
            f"task={task}",
            f"task.train={next(root.glob(f'{task}.*'))}",
            "task.num_train=40",
            "task.num_dev=8",
            "task.num_test=20",
            "steps=6",
            "eval_every=3",
            "batch_size=4",
            "base_lr=1e-4",
            "adapter_lr=0.05",
            "base_batch_fraction=" + ("0.5" if method == "hybrid" else "1.0"),
            f"output_dir={root / f'{method}-{adapter}-{task}'}",
        ]

    def get(*args, **kwargs):
        config = load_config(overrides=values(*args, **kwargs))
        if not (folder := root / str(config.output_dir)).exists():
            train(config, console=QUIET)
        return folder

    get.values = values
    return get


RUNS = [
    ("hybrid", "lora", "classification"),
    pytest.param("hybrid", "prompt", "classification", marks=pytest.mark.slow),
    ("hybrid", "prefix", "completion"),
    ("fo-peft", "ia3", "completion"),
    ("zo-peft", "p-tuning", "classification"),
    pytest.param("zo-ft", "none", "completion", marks=pytest.mark.slow),
    ("fo-ft", "none", "classification"),
]


@pytest.mark.parametrize(("method", "adapter", "task"), RUNS)
def test_a_run_is_trained_saved_loaded_and_exported(tmp_path, trained, method, adapter, task):
    run = trained(method, adapter, task)
    result = json.loads((run / "result.json").read_text())
    artifact = load(run)
    assert artifact.base.head == "seq2seq"
    spec = TaskSpec(**artifact.task)
    metrics = evaluate_artifact(artifact, spec, seed=artifact.base.seed).as_dict()
    assert metrics == pytest.approx(result["test"]["after"], rel=1e-4)
    assert metrics["loss"] != pytest.approx(result["test"]["before"]["loss"], rel=1e-6)
    assert "text2text-generation" in (run / "artifact" / "README.md").read_text()
    assert inspect(run).is_whole
    assert all(check.is_sound for check in checks_of(run))

    exported = export_model(run, tmp_path / "plain")
    assert exported.is_merged == (adapter in ("lora", "ia3", "none"))
    found: dict = {}
    with quiet():
        exec(exported.usage, found)
    model = found["model"].eval()
    kind = hf.T5ForConditionalGeneration if exported.is_merged else peft.PeftModel
    assert isinstance(model, kind)
    rows = EXAMPLES if task == "classification" else COMPLETIONS
    encoder = Encoder(artifact.tokenizer, head="seq2seq")
    encoded = [encoder(row) for row in rows]
    collator = Collator(artifact.tokenizer.pad_token_id)
    mine, plain = (predict_scores(m, encoded, collator) for m in (artifact.model, model))
    assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(mine, plain, strict=True))


def test_training_makes_the_labels_likelier(trained):
    config = load_config(
        overrides=[
            *trained.values()[:-1],
            "adapter_lr=0.02",
            "steps=20",
            f"output_dir={trained() / 'longer'}",
        ]
    )
    result = train(config, console=QUIET)
    assert result.after.loss < result.before.loss


def test_the_plan_of_a_run(trained):
    plan = make_plan(load_config(overrides=trained.values()))
    assert plan.num_parameters["adapter"][1] > 0
    assert plan.num_parameters["base"][0] == "zeroth"
    assert all(size > 0 for size in plan.memory_bytes.values())


def test_the_commands(trained):
    run = trained()
    runner = CliRunner()
    result = runner.invoke(app, ["predict", str(run), "the film is a great warm story"])
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)
    assert row["prediction"] in ("good", "bad")
    assert sum(row["probabilities"].values()) == pytest.approx(1)
    for command in (["eval", str(run), "--json"], ["info", str(run)], ["verify", str(run)]):
        assert runner.invoke(app, command).exit_code == 0, command
    written = runner.invoke(app, ["predict", str(trained("hybrid", "prefix", "completion")), "the"])
    assert written.exit_code == 0, written.output
    assert isinstance(json.loads(written.stdout)["prediction"], str)


def test_a_plain_model_is_scored(trained, encoder_decoder_folder):
    values = [value for value in trained.values() if value.startswith("task")]
    result = CliRunner().invoke(app, ["eval", encoder_decoder_folder, *values, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["num_rows"] == 20


def test_chats_are_refused(tmp_path, encoder_decoder_folder):
    rows = [
        {"messages": [{"role": "user", "content": f"a {i}"}, {"role": "assistant", "content": "b"}]}
        for i in range(20)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    values = [f"model={encoder_decoder_folder}", "task=chat", f"task.train={tmp_path}/chats.jsonl"]
    with pytest.raises(UserError, match="takes no turns of a chat; choose task completion"):
        make_plan(load_config(overrides=values))


def test_evaluation_does_not_depend_on_the_batch_size(encoder_decoder_folder):
    model, tokenizer = loaded(encoder_decoder_folder)
    encoder = Encoder(tokenizer, head="seq2seq")
    rows, collator = [encoder(e) for e in EXAMPLES * 3], Collator(tokenizer.pad_token_id)
    one, all_ = (
        evaluate(model, rows, collator, kind="choice", batch_size=size).loss for size in (1, 6)
    )
    assert one == pytest.approx(all_, rel=1e-5)


def test_the_zoo_has_a_head_that_zofo_finds(tmp_path):
    for architecture in ("llama", "gemma3", "deberta-v3", "flan-t5"):
        zoo.ARCHITECTURES[architecture]().save_pretrained(tmp_path / architecture)
        assert head_of(str(tmp_path / architecture)) == zoo.head_of(architecture)


def test_what_follows_every_candidate_is_what_is_scored(encoder_decoder_folder):
    model, tokenizer = load_model(str(encoder_decoder_folder), head="seq2seq")
    example = Example("the film by ", ("Ann", "Bob"), 1, "", 1, ending=" is great")
    batch = batch_of(tokenizer, [example])
    with torch.no_grad():
        expected = [
            float(score_by_hand(model, tokenizer, f"the film by {name}", "is great"))
            for name in ("Ann", "Bob")
        ]
        found = candidate_scores(model, batch)[0].tolist()
    assert found == pytest.approx(expected, abs=1e-5)


def test_answers_are_written_whatever_they_are_padded_to(encoder_decoder_folder):
    model, tokenizer = load_model(str(encoder_decoder_folder), head="seq2seq")
    prompts = [tokenizer(text)["input_ids"] for text in ("the film", "the film by Ann is", "a")]
    writer = Writer(tokenizer, 5)
    together = writer(model, prompts).texts
    assert together == tuple(writer(model, [prompt]).texts[0] for prompt in prompts)
    greedy = model.generate(
        input_ids=torch.tensor(prompts[:1]), max_new_tokens=5, do_sample=False, num_beams=1
    )
    assert together[0] == tokenizer.decode(greedy[0], skip_special_tokens=True)
