"""`zofo eval` and `zofo predict`: apply a trained or pretrained model to rows."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from zofo.cli.exits import app, reports_errors
from zofo.console import plain_console, printable_json, say
from zofo.errors import UserError

if TYPE_CHECKING:
    from zofo.config.schema import RunConfig
    from zofo.saved.artifact import Artifact

Target = Annotated[
    str, typer.Argument(help="Run folder, artefact or pretrained model (hub id, folder, alias).")
]


@app.command("eval")
@reports_errors
def evaluate(
    target: Target,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Options of the run, such as task.test=more.csv eval_batch_size=16 device=cpu.",
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Rows to score: train, dev or test.")] = "test",
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Measure a trained or a pretrained model on the held-out rows of a task."""
    from zofo.console import new_progress
    from zofo.scoring.score import evaluate_artifact

    if split not in ("train", "dev", "test"):
        raise UserError(f"split is {split!r}; choose train, dev or test")
    artifact, config = _open(target, overrides or [])
    notes: list[str] = []
    with new_progress(plain_console(stderr=True), "rows") as progress:
        task = progress.add_task("scoring", total=None, text="")
        metrics = evaluate_artifact(
            artifact,
            config.task,
            seed=config.seed,
            part=split,
            batch_size=config.eval_batch_size,
            progress=lambda num: progress.advance(task, num),
            report=notes.append,
        )
    for note in notes:
        say(f"note: {note}", stderr=True)
    values = metrics.as_dict()
    if as_json:
        say(json.dumps({"target": target, "task": config.task.name, "split": split, **values}))
        return
    say(f"{target} on {config.task.name}, {split}, {metrics.num_rows} rows")
    for name in ("f1", "exact_match", "accuracy", "auc", "majority", "loss", "perplexity"):
        if name in values:
            low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
            interval = "" if low is None or high is None else f"  [{low:.4f}, {high:.4f}]"
            say(f"  {name:<11}{values[name]:.4f}{interval}")


class _TakesTexts(TyperCommand):
    """A command whose error for a text that begins with - says where such a text stands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        texts = " ".join(shlex.quote(text) for text in args if text.startswith("-"))
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            # typer brings its own copy of click in some versions, so its class has two homes.
            if type(error).__name__ == "NoSuchOption":
                hint = f"A text that begins with - stands after --: predict RUN -- {texts}"
                error.message += f". {hint}"  # type: ignore[attr-defined]
            raise


@app.command(cls=_TakesTexts)
@reports_errors
def predict(
    target: Target,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEXT]...", help="Texts to predict; after -- also one that begins with -."
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            help="File of rows (jsonl, csv, ...) with the task's columns; labels may be absent.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="JSONL file to write. Default: standard output.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Option of the run, such as task.text=review.", metavar="KEY=VALUE"
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Limit of tokens to write. Default: the task's limit, else 64."),
    ] = None,
) -> None:
    """Predict labels with probabilities, or write completions, as one JSON object per row."""
    from zofo.console import new_progress
    from zofo.disk.files import write_text
    from zofo.scoring.predict import predict as predictions
    from zofo.scoring.predict import table_of_texts
    from zofo.tasks.rows import read_table

    if bool(texts) == (file is not None):
        raise UserError("give either texts to predict or --file with rows")
    _check_predict_options(texts or [], file, option or [])
    table = read_table(str(file)) if file is not None else None
    artifact, config = _open(target, option or [])
    if table is None:
        table = table_of_texts(config.task, texts or [])
    with new_progress(plain_console(stderr=True), "rows") as progress:
        task = progress.add_task("predicting", total=len(table.rows), text="")
        found = predictions(
            artifact,
            config.task,
            table,
            batch_size=config.eval_batch_size,
            max_new_tokens=max_new_tokens,
            progress=lambda num: progress.advance(task, num),
        )
        lines = [json.dumps(prediction, ensure_ascii=False) for prediction in found]
    text = "".join(f"{line}\n" for line in lines)
    if output is None:
        sys.stdout.write(printable_json(text))
    else:
        write_text(output, text)
        say(f"{len(lines)} predictions in {output}", stderr=True)


_PREDICT_TAKES = ("task", "model", "device", "eval_batch_size", "seed")


def _check_predict_options(texts: Sequence[str], file: Path | None, given: Sequence[str]) -> None:
    """Refuse options that would be predicted as a text, or that would change nothing."""
    from zofo.config.schema import RunConfig
    from zofo.tasks.rows import SUFFIXES

    def key_of(text: str) -> str:
        key, is_option, _ = text.partition("=")
        return key.partition(".")[0] if is_option else ""

    for text in texts:
        if key_of(text) in RunConfig.model_fields:
            raise UserError(
                f"{text!r} is an option, not a text to predict; write --set {text}. A text that "
                "looks like an option must come from --file"
            )
    for option in given:
        if key_of(option) in RunConfig.model_fields.keys() - set(_PREDICT_TAKES):
            raise UserError(
                f"predict does not use the option {option.partition('=')[0]}; remove it. It takes "
                f"{', '.join(_PREDICT_TAKES)}"
            )
    if file is not None and not str(file).lower().endswith(SUFFIXES):
        raise UserError(
            f"--file is {str(file)!r}; give a file that ends in one of {', '.join(SUFFIXES)}"
        )


def _open(target: str, given: Sequence[str]) -> tuple[Artifact, RunConfig]:
    """Load the model, and the configuration with task, seed, batch size and device."""
    from zofo.config.load import load_config
    from zofo.console import replay_bar
    from zofo.environment import resolve_device
    from zofo.models.loading import head_of
    from zofo.saved.artifact import HEADER_FILE, Artifact, BaseSpec, load, read_header
    from zofo.saved.manifest import find_artifact

    folder = Path(target).expanduser()
    is_artifact = any((f / HEADER_FILE).is_file() for f in (folder, folder / "artifact"))
    if not is_artifact and folder.is_dir() and not (folder / "config.json").exists():
        find_artifact(folder)  # Its error names the missing file.
    values: dict[str, Any] = {} if is_artifact else {"model": target}
    if is_artifact:
        header = read_header(find_artifact(folder))
        values = {"seed": header["base"]["seed"], "task": header["task"] or {}}
        own = values["task"].get("name")
        pairs = [override.partition("=") for override in given]
        if any(key in ("task", "task.name") and name != own for key, _, name in pairs):
            values["task"] = {}  # Another task cannot use the sizes and files of this one.
    config = load_config(values=values, overrides=given)
    device = resolve_device(config.device)
    if is_artifact:
        trusted = config.model.trust_remote_code
        with replay_bar(plain_console(stderr=True)) as bar:
            loaded = load(folder, device=device, trust_remote_code=trusted, progress=bar)
        return loaded, config
    model = config.model
    head = (
        model.head
        if model.head != "auto"
        else head_of(model.name, revision=model.revision, trust_remote_code=model.trust_remote_code)
    )
    if head == "classification":
        raise UserError(
            f"{target} is an encoder, whose classification head is untrained; give a run folder "
            "or an artefact"
        )
    base = BaseSpec(
        model.name,
        head=head,
        dtype=model.dtype,
        seed=config.seed,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        attn_implementation=model.attn_implementation,
        quantization=model.quantization,
    )
    plain, tokenizer = base.load(device)
    plain.to(device)
    plain.eval()
    return Artifact(plain, tokenizer, base, "none", None, ()), config
