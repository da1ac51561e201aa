"""A trained and exported SmolLM2-135M predicts the same with transformers alone."""

import numpy as np
import pytest
import torch
import transformers as hf
from rich.console import Console

from zofo.config.load import load_config
from zofo.errors import UserError
from zofo.models.loading import resolve
from zofo.run.train import train
from zofo.saved.artifact import load
from zofo.saved.export import export_model
from zofo.scoring.evaluate import predict_scores
from zofo.tasks.encode import Collator, Encoder
from zofo.tasks.load import load_splits


@pytest.mark.slow
def test_same_predictions_on_400_rows(tmp_path):
    values = ["steps=4", "batch_size=4", "adapter_lr=3e-3", "eval_every=4", "device=cpu"]
    config = load_config(
        "configs/demo.yaml",
        [*values, "task.num_dev=8", f"output_dir={tmp_path / 'run'}"],
    )
    try:
        resolve("smollm2-135m")
        rows = load_splits(config.task, seed=config.seed).test
    except UserError as error:
        pytest.skip(str(error))
    assert len(rows) == 400
    train(config, console=Console(quiet=True))
    exported = export_model(tmp_path / "run", tmp_path / "plain")

    artifact = load(tmp_path / "run")
    encoder = Encoder(artifact.tokenizer, max_length=config.task.max_length)
    collator = Collator(artifact.tokenizer.pad_token_id)
    expected = np.array(predict_scores(artifact.model, [encoder(row) for row in rows], collator))
    del artifact

    tokenizer = hf.AutoTokenizer.from_pretrained(exported.path)
    model = hf.AutoModelForCausalLM.from_pretrained(exported.path).eval()
    found = []
    for row in rows:
        prompt = tokenizer(row.prompt)["input_ids"]
        words = [tokenizer(row.prompt + c)["input_ids"][len(prompt) :] for c in row.candidates]
        assert [len(word) for word in words] == [1, 1]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt[-config.task.max_length :]])).logits
        found.append(logits[0, -1].log_softmax(-1)[[word[0] for word in words]].tolist())
    assert np.abs(np.array(found) - expected).max() < 1e-3
    # If two candidates have nearly equal scores, either prediction is right.
    clear = np.abs(expected[:, 0] - expected[:, 1]) > 1e-3
    assert clear.sum() >= 395
    assert np.array_equal(np.argmax(found, 1)[clear], expected.argmax(1)[clear])
