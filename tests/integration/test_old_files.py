"""Files that commit 50fe18a wrote still load, replay and resume to the same bits.

`written_by_50fe18a/expected.json` holds the results of that commit, computed by the functions
below. Loaded weights, replayed weights and the state at the start of resumed training depend on no
machine, so digests compare them. The steps that follow are compared with a tolerance, because
matrix products differ in their last bits between processors (AVX2 against AVX-512).
"""

from __future__ import annotations

import hashlib
import json
import runpy
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import zofo

FILES = Path(__file__).parents[1] / "fixtures" / "written_by_50fe18a"
EXPECTED = FILES / "expected.json"
ARTIFACTS = ["lora-float32", "lora-bfloat16", "p-tuning", "encoder-prompt", "zo-ft", "fo-ft"]
CHECKPOINTS = {
    "lora-float32-interrupted/checkpoint-4": "float32",
    "p-tuning-interrupted/checkpoint-4": "float32",
    "prefix-trainer/checkpoint-4": "bfloat16",
}
TRAJECTORY = "base_trajectory.safetensors"
DTYPES = ["float64", "float32", "bfloat16", "float16"]
NUM_UPDATES = 6


def digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous()
    text = f"{data.dtype} {tuple(data.shape)} ".encode()
    return hashlib.sha256(text + data.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def digests(tensors: Any) -> dict[str, str]:
    return {name: digest(tensor) for name, tensor in dict(tensors).items()}


def digest_of_all(tensors: Any) -> str:
    return hashlib.sha256(json.dumps(digests(tensors)).encode()).hexdigest()[:16]


def plain(state: Any, name: str = "") -> dict[str, Any]:
    """Flatten nested values to one dict, and replace every tensor by its digest."""
    if isinstance(state, Mapping):
        parts = state.items()
    elif isinstance(state, (list, tuple)):
        parts = enumerate(state)
    else:
        return {name: digest(state.reshape(-1)) if isinstance(state, Tensor) else state}
    return {k: v for key, part in parts for k, v in plain(part, f"{name}/{key}").items()}


def updates(trajectory: Any) -> list[Any]:
    return [
        [[u.step, list(u.projected_grad), u.lr, u.weight_decay] for u in row]
        for row in trajectory.updates
    ]


def loaded(folder: str) -> dict[str, str]:
    return digests(zofo.load(folder).model.named_parameters())


def from_checkpoint(folder: str) -> dict[str, str]:
    base, _ = zofo.load_model("base", dtype=CHECKPOINTS[folder])
    return digests(zofo.load_checkpoint(base, folder).named_parameters())


def replayed(dtype: str, start: int, stop: int) -> str:
    """Return the digest of the base after replaying up to `start`, and then up to `stop`."""
    base = zofo.split_parameters(zofo.load_model("base", dtype=dtype)[0]).base
    trajectory, _ = zofo.Trajectory.load(Path(TRAJECTORY))
    trajectory.replay(base, stop=start)
    trajectory.replay(base, start=start, stop=stop)
    return digest_of_all(base)


def command(*arguments: str) -> int:
    """Run `python -m zofo` in this process and return the exit code."""
    with patch.object(sys, "argv", ["zofo", *arguments]), pytest.raises(SystemExit) as exit:
        runpy.run_module("zofo", run_name="__main__")
    return int(exit.value.code or 0)


def replayed_by_command() -> dict[str, str]:
    """Return the digests of a run's base after its third update."""
    assert command("replay", "lora-float32", "--step", "3", "--to", "replayed") == 0
    return digests(load_file("replayed/model.safetensors"))


def resume(folder: str) -> None:
    assert command("train", "--resume", folder) == 0


def library_trainer(*callbacks: Any) -> Any:
    """Return a trainer on a bfloat16 base, built as a user of the library builds it."""
    base, tokenizer = zofo.load_model("base", dtype="bfloat16")
    texts = [line.split(",")[0] for line in Path("rows.csv").read_text().splitlines()[1:]]
    rows = [tokenizer(text)["input_ids"][:8] for text in texts]
    return zofo.HybridTrainer(
        model=zofo.create_adapter(base, "prefix", tokenizer=tokenizer, num_virtual_tokens=3),
        args=zofo.HybridArguments(
            output_dir="prefix-trainer",
            base_lr={"*layers.0*": 1e-1, "*.weight": 2e-2},
            base_weight_decay=0.1,
            eps=1e-1,
            estimator="central",
            distribution="gaussian",
            num_directions=2,
            base_every=2,
            zo_seed=2**40 + 3,
            learning_rate=1e-2,
            optim="adamw_torch",
            per_device_train_batch_size=2,
            max_steps=6,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows if len(row) == 8],
        callbacks=list(callbacks),
    )


def resume_trainer() -> None:
    library_trainer().train(resume_from_checkpoint=True)


def state_at_first_step(start: Callable[[], Any]) -> dict[str, Any]:
    """Return the state from which training resumes.

    It holds the weights, the optimizer, the rows, the generator and the recorded updates.
    """
    seen: dict[str, Any] = {}
    original = zofo.HybridMixin.training_step

    def training_step(self: Any, model: Any, inputs: Any, *args: Any) -> Tensor:
        if not seen:
            seen["step"] = self.state.global_step
            seen["weights"] = digests(model.named_parameters())
            seen["optimizer"] = plain(self.optimizer.state_dict())
            seen["scheduler"] = plain(self.lr_scheduler.state_dict())
            seen["rows"] = plain(dict(inputs))
            seen["generator"] = digest(torch.get_rng_state())
            seen["updates"] = updates(self.trajectory)
        return original(self, model, inputs, *args)

    with patch.object(zofo.HybridMixin, "training_step", training_step):
        start()
    return json.loads(json.dumps(seen))


def summary_of(folder: str) -> dict[str, float]:
    """Return what a run logged at its end.

    Its mean loss includes the steps before the interruption.
    """
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    (last,) = [line for line in lines if "train_loss" in line]
    return {key: last[key] for key in ("step", "train_loss")}


RESUMED: dict[str, Callable[[], Any]] = {
    "lora-float32-interrupted": lambda: resume("lora-float32-interrupted"),
    "p-tuning-interrupted": lambda: resume("p-tuning-interrupted"),
    "prefix-trainer": resume_trainer,
}


@pytest.fixture(scope="module")
def expected():
    return json.loads(EXPECTED.read_text())


@pytest.fixture
def old(tmp_path, monkeypatch):
    """Return a copy of the files. It is the working folder, because their paths are relative."""
    shutil.copytree(FILES, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


@pytest.mark.parametrize("folder", ARTIFACTS)
def test_an_artefact_loads_to_the_same_bits(old, expected, folder):
    assert loaded(folder) == expected["loaded"][folder]


@pytest.mark.parametrize("folder", CHECKPOINTS)
def test_a_checkpoint_loads_to_the_same_bits(old, expected, folder):
    assert from_checkpoint(folder) == expected["checkpoints"][folder]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_trajectory_replays_to_the_same_bits(old, expected, dtype):
    known = expected["replayed"][dtype]
    for stop in range(NUM_UPDATES + 1):
        assert replayed(dtype, stop // 2, stop) == known[stop], stop
    assert len(set(known)) == NUM_UPDATES + 1


def test_a_trajectory_says_what_it_said(old, expected):
    trajectory, header = zofo.Trajectory.load(Path(TRAJECTORY))
    assert updates(trajectory) == expected["trajectory"]["updates"]
    assert header == expected["trajectory"]["header"]


def test_the_commands_read_an_old_run(old, expected):
    assert command("info", "p-tuning-interrupted") == 0
    assert command("verify", "lora-float32") == 0
    assert replayed_by_command() == expected["replayed by command"]


@pytest.mark.parametrize("folder", RESUMED)
def test_training_goes_on_from_the_same_bits(old, expected, folder):
    seen, known = state_at_first_step(RESUMED[folder]), expected["resumed"][folder]
    assert seen.keys() == known.keys()
    for key in known:
        # The state may have entries that did not exist then.
        kept = {k: seen[key][k] for k in known[key]} if key == "optimizer" else seen[key]
        assert kept == known[key], key
    if folder == "prefix-trainer":
        return
    # The reference is the uninterrupted run with the same settings.
    twin = folder.removesuffix("-interrupted")
    ends = [zofo.load(name).model.state_dict() for name in (folder, twin)]
    for name in ends[1]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-4, atol=1e-5)
    paths = [Path(name, "artifact", TRAJECTORY) for name in (folder, twin)]
    rows, other = (updates(zofo.Trajectory.load(path)[0]) for path in paths)
    num_before = len(known["updates"])
    assert rows[:num_before] == known["updates"] == other[:num_before]
    assert len(rows) == len(other) == NUM_UPDATES
    for (mine,), (theirs,) in zip(rows[num_before:], other[num_before:], strict=True):
        assert mine[0] == theirs[0]
        assert mine[1] == pytest.approx(theirs[1], abs=1e-3)
        assert mine[2:] == theirs[2:]
    summaries = [summary_of(name) for name in (folder, twin)]
    assert summaries[0] == pytest.approx(summaries[1], rel=1e-3)


def test_resuming_uses_the_copy_of_the_base(old, expected):
    """Resuming reads the saved copy of the base and does not replay the base.

    The test marks the copy: it differs from the replayed base in one weight.
    """
    folder = "lora-float32-interrupted"
    shutil.copy("marked_snapshot.safetensors", f"{folder}/base_snapshot.safetensors")
    seen = state_at_first_step(RESUMED[folder])
    assert seen["weights"] == expected["resumed from the marked copy"]
    assert seen["weights"] != expected["resumed"][folder]["weights"]


def test_the_files_name_no_folder_of_the_machine_that_made_them():
    for path in FILES.rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            content = path.read_bytes()
            for place in (b"/work", b"/tmp", b"/home", b"/root"):
                assert place not in content, path
