"""Measures scores on the test rows after the rates are chosen.

    python -m zofo.study.measure start CONFIG.yaml OUT.json    the untrained model of a run
    python -m zofo.study.measure run RUN START.json            the artefact of a run

The second command writes the scores of the artefact and of the untrained model into the run's
result.json. `--trust-remote-code` before either allows code from the model's repository.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from zofo.config.load import load_config
from zofo.config.schema import RunConfig
from zofo.console import say
from zofo.disk.files import read_json_object, write_json
from zofo.disk.recorded import alterations, write_recorded
from zofo.environment import resolve_device
from zofo.errors import UserError
from zofo.saved.artifact import Artifact, load
from zofo.saved.layout import CONFIG_FILE, RESULT_FILE
from zofo.saved.source import base_of
from zofo.scoring.evaluate import Metrics
from zofo.scoring.score import evaluate_artifact
from zofo.study.spec import SPEC_FILE
from zofo.tasks.load import load_splits


def measure_start(config_file: Path, output: Path, *, trust_remote_code: bool = False) -> None:
    """Write the test scores of the model from which a run starts, without an adapter.

    Raises:
        UserError: if the data or the model cannot be used, or needs code that is not allowed.
    """
    config = load_config(config_file, trust_remote_code=trust_remote_code)
    device = _device(config)
    tokenizer = config.model.tokenizer()
    base = base_of(config, load_splits(config.task, seed=config.seed, tokenizer=tokenizer))
    model, tokenizer = base.load()
    model.to(device)
    model.eval()
    scores = _scores(Artifact(model, tokenizer, base, "none", None, ()), config)
    _write(output.absolute(), output.absolute().parents[2], scores.as_dict())


def measure_run(folder: Path, start: Path, *, trust_remote_code: bool = False) -> None:
    """Add test scores before and after training to the result of a run.

    Raises:
        UserError: if the artefact or its base is missing, or needs code that is not allowed.
    """
    folder, start = folder.absolute(), start.absolute()
    config = load_config(folder / CONFIG_FILE, trust_remote_code=trust_remote_code)
    study = folder.parents[1]
    result, before = read_json_object(folder / RESULT_FILE), read_json_object(start)
    problems = alterations(study, [start]) if start.is_relative_to(study) else []
    if problems:
        raise UserError(f"{problems[0]}; remove it, and the study measures it again")
    artifact = load(folder, device=_device(config), trust_remote_code=trust_remote_code)
    after = _scores(artifact, config)
    result["test"] = {"before": before, "after": after.as_dict()}
    _write(folder / RESULT_FILE, study, result)


def _write(path: Path, study: Path, value: dict[str, Any]) -> None:
    """Write a file, and record its digest if its folder is part of a study."""
    if (study / SPEC_FILE).is_file():
        write_recorded(study, path, value)
    else:
        write_json(path, value)


def _device(config: RunConfig) -> str:
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    return resolve_device(config.device)


def _scores(artifact: Artifact, config: RunConfig) -> Metrics:
    return evaluate_artifact(
        artifact, config.task, seed=config.seed, batch_size=config.eval_batch_size
    )


def main(arguments: list[str]) -> int:
    """Run the command; an error is printed as one message."""
    is_trusted = arguments[0] == "--trust-remote-code"
    what, given, other = arguments[is_trusted:]
    command = {"start": measure_start, "run": measure_run}[what]
    try:
        command(Path(given), Path(other), trust_remote_code=is_trusted)
    except UserError as error:
        say(f"error: {error}", stderr=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
