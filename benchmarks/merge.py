"""Measure what merging a LoRA into a quantised base does to the logits.

Run `python benchmarks/merge.py` for SmolLM2-135M in nf4, with a LoRA of some steps. The reference
is the trained model: the quantised base with the adapter beside it. The table is Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zofo.config.load import load_config
from zofo.models.loading import load_model
from zofo.run.prepare import prepare
from zofo.run.train import train
from zofo.saved.artifact import load
from zofo.saved.manifest import ADAPTER_FOLDER


@torch.no_grad()
def logits_of(model: Any, rows: list[list[int]]) -> Tensor:
    """Logits at every position of every row, without padding: [positions, tokens]."""
    model.eval()
    return torch.cat([model(input_ids=torch.tensor([row])).logits[0].float() for row in rows])


def with_adapter(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder)


def merged(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of the rounding that is measured here.
        return model.merge_and_unload()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quantization", nargs="+", default=["nf4"])
    parser.add_argument("--task", nargs="+", default=["task=rotten-tomatoes"], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rows", type=int, default=64, help="test rows whose logits are compared")
    args = parser.parse_args()

    print("| base | what is served | max | mean | same token | loss |")
    print("|---|---|---:|---:|---:|---:|")
    for quantization in args.quantization:
        with tempfile.TemporaryDirectory() as folder:
            measure(args, quantization, Path(folder) / "run")


def measure(args: argparse.Namespace, quantization: str, run: Path) -> None:
    config = load_config(
        overrides=[
            *("method=fo-peft", f"model={args.model}", f"model.quantization={quantization}"),
            *(f"steps={args.steps}", f"eval_every={args.steps}", "select_best=false"),
            *(f"task.num_test={args.rows}", "task.num_dev=16", "measure_test=false", "device=cpu"),
            *(f"output_dir={run}", *args.task),
        ]
    )
    train(config)
    rows = [list(row.rows[0]) for row in prepare(config).rows["test"]]
    adapter = run / "artifact" / ADAPTER_FOLDER

    def base() -> Any:
        return load_model(args.model, quantization=quantization)[0]

    targets = torch.cat([torch.tensor([*row[1:], -100]) for row in rows])  # [positions]
    trained = logits_of(load(run).model, rows)
    served: dict[str, Callable[[], Any]] = {
        "base without the adapter": base,
        "adapter beside the base": lambda: with_adapter(base(), adapter),
        f"peft merges into {quantization}": lambda: merged(with_adapter(base(), adapter)),
        "peft merges into the dequantised base": lambda: merged(
            with_adapter(base().dequantize(), adapter)
        ),
    }
    for what, make in served.items():
        logits = logits_of(make(), rows)
        change = (logits - trained).abs()
        same = (logits.argmax(1) == trained.argmax(1)).float().mean()
        loss = torch.nn.functional.cross_entropy(logits, targets)
        print(
            f"| {args.model}, {quantization} | {what} | {change.max():.2g} | {change.mean():.2g} | "
            f"{same:.1%} | {loss:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
