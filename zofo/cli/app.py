"""Commands, their options, and how errors leave: one message, exit code 2, no traceback."""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer

from zofo.errors import TrainingStoppedError, UserError

EXIT_STOPPED: Final = 1
EXIT_USER_ERROR: Final = 2
EXIT_INTERRUPTED: Final = 130
F = TypeVar("F", bound=Callable[..., Any])

app = typer.Typer(
    name="zofo",
    help="Hybrid fine-tuning of language models: zeroth-order steps for every base weight, exact "
    "gradients for a PEFT adapter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.yaml] [KEY=VALUE]...",
        help="A configuration file, and values that go before it: steps=500 task.num_train=200.",
        show_default=False,
    ),
]


def reports_errors(command: F) -> F:
    """Turn bad input and Ctrl-C into a message and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            with warnings.catch_warnings(), _bitsandbytes_errors_only():
                warnings.showwarning = _show_warning
                return command(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(EXIT_USER_ERROR) from None
        except TrainingStoppedError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(EXIT_STOPPED) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(EXIT_INTERRUPTED) from None

    return wrapped  # type: ignore[return-value]


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """One line, without the place in the code that a user has no use for."""
    print(f"warning: {message}", file=sys.stderr)


@contextmanager
def _bitsandbytes_errors_only() -> Iterator[None]:
    """Peft imports it where it is installed, and it reports on kernels that nobody asked for."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def split_arguments(arguments: list[str] | None) -> tuple[Path | None, list[str]]:
    """A configuration file, if the first argument is one, and the overrides."""
    given = list(arguments or [])
    if given and "=" not in given[0]:
        return Path(given[0]), given[1:]
    return None, given


def _version(wanted: bool) -> None:
    if wanted:
        from zofo.version import __version__

        print(f"zofo {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
@reports_errors
def train(
    arguments: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show configuration, parameters, memory and cost.")
    ] = False,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Run folder to continue.", metavar="RUN")
    ] = None,
) -> None:
    """Fine-tune a model on a task, measure it before and after, and save it.

    zofo train configs/rotten-tomatoes.yaml steps=100

    zofo train task=classification task.train=reviews.csv model=smollm2-135m
    """
    from zofo.cli.train import resume as resume_run
    from zofo.cli.train import show_plan, start

    path, overrides = split_arguments(arguments)
    if resume is not None:
        resume_run(resume, path, overrides)
    elif dry_run:
        show_plan(path, overrides)
    else:
        start(path, overrides)


@app.command("eval")
@reports_errors
def evaluate(
    target: Annotated[
        str, typer.Argument(help="Run folder, artefact, or a model: hub id, folder, alias.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="task.test=more.csv eval_batch_size=16 seed=1 device=cpu.",
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "test",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a trained model, or a plain one, on a task's held-out rows."""
    from zofo.cli.use import evaluate as evaluate_target

    evaluate_target(target, list(overrides or []), split, as_json)


@app.command()
@reports_errors
def predict(
    target: Annotated[
        str, typer.Argument(help="Run folder, artefact, or a model: hub id, folder, alias.")
    ],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts to predict.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", help="jsonl, csv, ... with the task's columns (labels not needed)."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="jsonl to write; default: standard output.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="task.text=review, eval_batch_size=16, ...", metavar="KEY=VALUE"
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Longest text of a completion or chat task (64), or answer (the task's)."
        ),
    ] = None,
) -> None:
    """Predict labels with their probabilities, or write completions, one JSON object a row."""
    from zofo.cli.use import predict as predict_rows

    predict_rows(target, list(texts or []), file, output, list(option or []), max_new_tokens)


@app.command()
@reports_errors
def study(
    name: Annotated[
        str, typer.Argument(metavar="STUDY", help="YAML file, preset (laptop, paper), or folder.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="seeds=[0,1] output=studies/mine."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Runs at once, on this machine.")] = 1,
    join: Annotated[
        bool, typer.Option("--join", help="Only help with a study that was begun elsewhere.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try again what has failed.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show counts, cost and the first configurations.")
    ] = False,
    status: Annotated[bool, typer.Option("--status", help="Show how far it is.")] = False,
) -> None:
    """Run a grid of methods, rates and seeds: choose rates on dev, then measure on test, once.

    zofo study laptop --workers 2

    zofo study studies/laptop --status
    """
    from zofo.cli.study import show_plan, show_status, start

    given = list(overrides or [])
    if dry_run:
        show_plan(name, given)
    elif status:
        show_status(name, given)
    else:
        start(name, given, workers, join, retry_failed)


@app.command()
@reports_errors
def advise(
    arguments: Overrides = None,
    caps: Annotated[
        str | None,
        typer.Option(
            help="ignore or apply: whether the theorem's caps, always shown, lower the rates. "
            "Default: apply with --target, else ignore."
        ),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(help="Norm of the gradient to reach, for the theorem's number of epochs."),
    ] = None,
    split: Annotated[
        bool, typer.Option("--split/--no-split", help="Look for rates by group of base modules.")
    ] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write numbers and measurements here.")
    ] = None,
) -> None:
    """Measure learning rates and eps for a run, and what it may be expected to reach.

    zofo advise configs/demo.yaml

    zofo advise task=boolq adapter=prompt steps=500 --json advice.json
    """
    from zofo.cli.advise import advise as show_advice

    path, overrides = split_arguments(arguments)
    show_advice(path, overrides, caps=caps, target=target, split=split, json_file=json_file)


@app.command()
@reports_errors
def doctor() -> None:
    """Show the environment: versions, devices, embedded models and data, what is missing."""
    from zofo.cli.doctor import doctor as is_sound

    if not is_sound():
        raise typer.Exit(1)


@app.command()
@reports_errors
def tasks(
    name: Annotated[str | None, typer.Argument(help="Show this task's prompt and rows.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="task.data_dir=rte task.num_dev=100 seed=1."),
    ] = None,
) -> None:
    """List the tasks, or show one: prompt, candidates, rows of each class."""
    from zofo.cli.doctor import tasks as show_tasks

    show_tasks(name, list(overrides or []))


@app.command()
@reports_errors
def export(
    folder: Annotated[Path, typer.Argument(help="Run folder, artefact, or checkpoint of a run.")],
    to: Annotated[Path, typer.Option("--to", help="Folder to write; new or empty.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: the base's.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file.")] = "5GB",
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run code that the base's repository brings."),
    ] = False,
) -> None:
    """Write a trained model as a plain Hugging Face folder, checked against the trained model.

    zofo export runs/rotten-tomatoes-hybrid-lora --to plain --dtype bfloat16
    """
    from zofo.cli.saved import export as export_folder

    export_folder(folder, to, dtype, max_shard_size, trust_remote_code)


@app.command()
@reports_errors
def info(
    path: Annotated[Path, typer.Argument(help="Run folder, artefact, checkpoint or export.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a folder is, whether it is whole, and which base it belongs to."""
    from zofo.cli.saved import info as show_info

    show_info(path, as_json)


@app.command()
@reports_errors
def replay(
    path: Annotated[Path, typer.Argument(help="Run folder, artefact, or checkpoint of a run.")],
    step: Annotated[int, typer.Option("--step", help="Updates of the base; 0: the original.")],
    to: Annotated[Path, typer.Option("--to", help="Folder to write; new or empty.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: the base's.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file.")] = "5GB",
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run code that the base's repository brings."),
    ] = False,
) -> None:
    """Write the base as it was after some updates, without adapter, as a Hugging Face folder."""
    from zofo.cli.saved import replay as replay_to

    replay_to(path, step, to, dtype, max_shard_size, trust_remote_code)


@app.command()
@reports_errors
def verify(
    path: Annotated[Path, typer.Argument(help="Run folder, artefact, checkpoint or export.")],
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run code that the base's repository brings."),
    ] = False,
) -> None:
    """Load a folder step by step and print each check; exit code 2 if one fails."""
    from zofo.cli.saved import verify as is_sound

    if not is_sound(path, trust_remote_code):
        raise typer.Exit(EXIT_USER_ERROR)


@app.command()
@reports_errors
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUNS...", help="Run folders, or a study's folder.")
    ],
    to: Annotated[Path, typer.Option("--to", help="Page to write, in place of an earlier one.")] = (
        Path("report.html")
    ),
    markdown: Annotated[
        Path | None, typer.Option(help="Also write verdict and tables as Markdown.")
    ] = None,
) -> None:
    """Compare runs: a table here, and one self-contained page with figures and statistics.

    zofo report runs/rte-hybrid-lora runs/rte-fo-peft-lora --to report.html
    """
    from zofo.cli.report import report as write_page

    write_page(runs, to, markdown)


@app.command()
@reports_errors
def smoothness(
    arguments: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be measured and its cost.")
    ] = False,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Folder to continue.", metavar="FOLDER")
    ] = None,
) -> None:
    """Measure a loss: curvature of base and adapter, along a run, and what the theory assumes.

    zofo smoothness configs/smoothness.yaml

    zofo smoothness model=minilm task=rotten-tomatoes steps=60 smoothness.split=layer

    zofo smoothness smoothness.train=false
    """
    from zofo.cli.smoothness import resume as resume_folder
    from zofo.cli.smoothness import show_plan, start

    path, overrides = split_arguments(arguments)
    if resume is not None:
        if path is not None or overrides:
            raise UserError("--resume continues a folder as it was begun; give it nothing else")
        resume_folder(resume)
    elif dry_run:
        show_plan(path, overrides)
    else:
        start(path, overrides)


@app.command()
@reports_errors
def bench(
    model: Annotated[
        str, typer.Option(help="Hub id, folder, alias, or random:llama-135m, random:llama-1b.")
    ] = "smollm2-135m",
    adapter: Annotated[str, typer.Option(help="lora, prompt, or any other adapter.")] = "lora",
    batch: Annotated[int, typer.Option(help="Rows.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens a row.")] = 32,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    threads: Annotated[
        str | None, typer.Option(help="Of the CPU; 1,2 runs each; default: torch's choice.")
    ] = None,
    distribution: Annotated[
        str, typer.Option(help="Of the directions in our steps: rademacher or gaussian.")
    ] = "rademacher",
    rounds: Annotated[int, typer.Option(help="Samples of each contender.")] = 7,
    only: Annotated[
        str | None, typer.Option(help="Contenders, separated by commas; default: all.")
    ] = None,
    elements: Annotated[int, typer.Option(help="Weights the noise kernels work on.")] = 1 << 25,
    noise_only: Annotated[bool, typer.Option("--noise-only", help="Only the kernels.")] = False,
    no_noise: Annotated[bool, typer.Option("--no-noise", help="Without the kernels.")] = False,
    no_memory: Annotated[bool, typer.Option("--no-memory", help="Without peak memory.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write samples, ratios, environment here.")
    ] = None,
    memory_of: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure what a step costs: every method, ours and as published, and the noise kernels.

    zofo bench --threads 1,2 --json bench.json

    zofo bench --device cuda --model random:llama-1b --dtype bfloat16 --json gpu.json
    """
    from zofo.bench.settings import settings_from

    if noise_only and no_noise:
        raise UserError("--noise-only and --no-noise leave nothing to measure; drop one of them")
    settings = settings_from(
        model=model,
        adapter=adapter,
        batch=batch,
        length=length,
        dtype=dtype,
        device=device,
        threads=threads,
        distribution=distribution,
        rounds=rounds,
        only=only,
        elements=elements,
        steps=not noise_only,
        memory=not (no_memory or noise_only),
        noise=not no_noise,
        json_file=json_file,
    )
    from zofo.cli.bench import bench as run_bench
    from zofo.cli.bench import memory_of as print_memory_of

    if memory_of is not None:
        print_memory_of(settings, memory_of)
    else:
        run_bench(settings, json_file)


@app.command()
@reports_errors
def convergence(
    experiments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[EXPERIMENT]...", help="Which; --list names them. Default: all."),
    ] = None,
    to: Annotated[Path, typer.Option("--to", help="Folder of the study; continued if there.")] = (
        Path("runs/convergence")
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Few seeds, epochs and rates: to try it out.")
    ] = False,
    engine: Annotated[
        str, typer.Option(help="compiled, or optimizer: zofo.HybridOptimizer itself, slow.")
    ] = "compiled",
    seeds: Annotated[
        int | None, typer.Option(help="Seeds of every cell; default: 24, 6 with --quick.")
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="Show the experiments.")] = False,
) -> None:
    """Test what the theory claims on problems with known constants: exponents, caps, readings.

    zofo convergence --to runs/convergence

    zofo convergence order zeroth --quick --to runs/quick
    """
    from zofo.cli.convergence import convergence as run_convergence

    run_convergence(list(experiments or []), to, quick, engine, seeds, show_list)


def main() -> None:
    """Entry point."""
    app()
