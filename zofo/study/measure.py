"""Scores on the test rows, once the rates are chosen.

    python -m zofo.study.measure start CONFIG.yaml OUT.json    of a configuration's untrained model
    python -m zofo.study.measure run RUN START.json            of a run's artefact

The scores of a run go into its result.json, with those of the untrained model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from zofo.config.load import load_config
from zofo.config.schema import RunConfig
from zofo.disk.files import read_json, write_json
from zofo.environment import resolve_device
from zofo.errors import UserError
from zofo.saved.artifact import Artifact, load
from zofo.saved.layout import CONFIG_FILE, RESULT_FILE
from zofo.saved.source import base_of
from zofo.scoring.evaluate import Metrics
from zofo.scoring.score import evaluate_artifact
from zofo.tasks.load import load_splits


def measure_start(config_file: Path, output: Path) -> None:
    """Write the test scores of the model that a run begins with, without adapter.

    Raises:
        UserError: for anything wrong with data or model.
    """
    config = load_config(config_file)
    device = _device(config)
    tokenizer = config.model.tokenizer()
    base = base_of(config, load_splits(config.task, seed=config.seed, tokenizer=tokenizer))
    model, tokenizer = base.load()
    model.to(device)
    model.eval()
    scores = _scores(Artifact(model, tokenizer, base, "none", None, ()), config)
    write_json(output, scores.as_dict())


def measure_run(folder: Path, start: Path) -> None:
    """Add the test scores of a run's artefact, and those before training, to its result.

    Raises:
        UserError: if there is no artefact, or its base cannot be found.
    """
    config = load_config(folder / CONFIG_FILE)
    result: dict[str, Any] = read_json(folder / RESULT_FILE)
    trusted = config.model.trust_remote_code
    artifact = load(folder, device=_device(config), trust_remote_code=trusted)
    after = _scores(artifact, config)
    result["test"] = {"before": read_json(start), "after": after.as_dict()}
    write_json(folder / RESULT_FILE, result)


def _device(config: RunConfig) -> str:
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    return resolve_device(config.device)


def _scores(artifact: Artifact, config: RunConfig) -> Metrics:
    return evaluate_artifact(
        artifact, config.task, seed=config.seed, batch_size=config.eval_batch_size
    )


def main(arguments: list[str]) -> int:
    """The command; what is wrong is one message."""
    what, given, other = arguments
    try:
        {"start": measure_start, "run": measure_run}[what](Path(given), Path(other))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
