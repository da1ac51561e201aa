"""Find the parts of a trained model in a run folder, an artefact or a checkpoint.

base         name of the base, as it was before training
adapter      files of peft, if the method trains an adapter
trajectory   updates of the base, if zeroth-order steps trained it
whole        the model as a whole, if first-order steps trained it or a checkpoint holds it
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
from torch import nn

from zofo.config.load import load_config
from zofo.config.schema import RunConfig
from zofo.console import quiet
from zofo.disk.files import read_json, refusing, write_json
from zofo.errors import UserError
from zofo.models.loading import head_of, resolve
from zofo.models.trust import require_trust
from zofo.optim.methods import METHODS, methods_that
from zofo.optim.trajectory import TRAJECTORY_FILE, Trajectory
from zofo.results.belonging import mixed_up
from zofo.saved.assemble import Assembly, Parts, has_tokenizer
from zofo.saved.checkpoint_folders import find_damage, find_misfit
from zofo.saved.layout import ARTIFACT_FOLDER, BASE_FILE, CONFIG_FILE, STATE_FILE
from zofo.saved.manifest import (
    ADAPTER_FOLDER,
    HEADER_FILE,
    MODEL_FOLDER,
    BaseSpec,
    find_artifact,
    read_header,
)
from zofo.tasks.spec import Splits


@dataclass(frozen=True, kw_only=True)
class Source(Parts):
    """Where the parts of a trained model lie, and how it was trained."""

    kind: str  # "artefact" or "checkpoint"
    base: BaseSpec  # the base that training began with
    method: str
    task: dict[str, Any] | None  # its options; None if the model learned a task outside zofo
    labels: tuple[str, ...]  # names of the classes

    def history(self) -> Trajectory:
        """Read the recorded updates of the base.

        Raises:
            UserError: if the method records no updates, or the file is damaged.
        """
        if self.trajectory is None:
            raise UserError(
                f"{self.folder} was trained by {self.method}, which records no steps of the base; "
                f"only {methods_that(lambda m: m.base == 'zeroth', joined_by='and')} do"
            )
        return Trajectory.load(self.trajectory)[0]

    def load_start(self) -> tuple[nn.Module, Any]:
        """Load the base before training with the trained adapter, and the tokenizer.

        Raises:
            UserError: if the base cannot be loaded or differs from the recorded one, or the adapter
                does not fit it.
        """
        made = Assembly(self).run("files", "history", "base", "adapter", "fingerprint")
        return made.model, made.tokenizer

    def plain_tokenizer(self) -> Any:
        """Load the tokenizer as its author saved it, without the settings for training."""
        import transformers as hf

        is_saved = self.whole is not None and has_tokenizer(self.whole)
        name = str(self.whole) if is_saved else resolve(self.base.name)
        with refusing(f"the tokenizer of {name} cannot be loaded"), quiet():
            return hf.AutoTokenizer.from_pretrained(
                name,
                revision=None if is_saved else self.base.revision,
                trust_remote_code=self.base.trust_remote_code,
            )

    def load(
        self,
        progress: Callable[[int, int], None] | None = None,
        *,
        device: str = "cpu",
        disk: Path | None = None,
    ) -> tuple[nn.Module, Any]:
        """Load the trained model in evaluation mode, and the tokenizer.

        Args:
            progress: called during the replay with the number of weights done and the total number.
            device: where bitsandbytes puts a quantised base; any other is loaded on the CPU.
            disk: a folder for temporary files that hold the base; None: memory holds it.

        Raises:
            UserError: as `load_start`, or if the trajectory or the whole model is damaged.
        """
        made = Assembly(self, progress=progress, device=device, disk=disk).run()
        return made.model, made.tokenizer


def open_source(path: str | Path, *, trust_remote_code: bool = False) -> Source:
    """Find a trained model.

    Args:
        path: the folder of a finished run, an artefact, or `checkpoint-N` in a run folder.
        trust_remote_code: whether to run code from the base's repository, if the base needs it.

    Raises:
        UserError: if the folder is none of these, or a file is damaged, or it needs code that is
            not allowed.
    """
    path = Path(path).expanduser()
    if is_checkpoint(path):
        source = _checkpoint(path, trust_remote_code)
    else:
        folder = find_artifact(path)
        mixed = None if folder == path else mixed_up(path)  # An artefact may be named alone.
        if mixed is not None:
            raise UserError(mixed)
        source = _artifact(folder)
    base = source.base
    require_trust(
        path,
        base.name,
        wishes_code=base.trust_remote_code,
        attention=base.attn_implementation,
        is_allowed=trust_remote_code,
    )
    return source


def _artifact(folder: Path) -> Source:
    header = read_header(folder)
    method = METHODS[header["method"]]
    return Source(
        kind="artefact",
        folder=folder,
        base=BaseSpec(**header["base"]),
        method=header["method"],
        task=header["task"],
        labels=tuple(header["labels"]),
        adapter=folder / ADAPTER_FOLDER if method.needs_adapter else None,
        trajectory=folder / TRAJECTORY_FILE if method.base == "zeroth" else None,
        whole=folder / MODEL_FOLDER if method.base == "first" else None,
        header=header,
    )


def is_checkpoint(path: Path) -> bool:
    """Whether the folder is a checkpoint in the layout of Trainer."""
    return (path / STATE_FILE).is_file() and not (path / HEADER_FILE).is_file()


def plain_base(
    source: Source,
    *,
    stop: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    disk: Path | None = None,
) -> nn.Module:
    """Load the base without adapter, and replay its first `stop` updates; None for all.

    `Source.load_start` must have checked the base. `disk` is that of `Source.load`.
    """
    assembly = Assembly(source, stop=stop, progress=progress, disk=disk)
    model: nn.Module = assembly.run("history", "base", "replay", "buffers", "finite").model
    return model


def drop_weights(model: nn.Module, weights: Iterable[nn.Parameter] | None = None) -> None:
    """Free the memory of some or all weights of a model, although references to it remain.

    The model cannot run afterwards.
    """
    for parameter in model.parameters() if weights is None else weights:
        parameter.data = parameter.data.new_empty(0)


def _checkpoint(folder: Path, trust_remote_code: bool) -> Source:
    run = folder.resolve().parent
    if not (run / CONFIG_FILE).is_file():
        raise UserError(
            f"{folder} is a checkpoint outside a run folder of zofo, so its base is not known; "
            "load it with zofo.load_checkpoint(base, folder)"
        )
    damage = find_damage(folder)
    if damage is not None:
        raise UserError(f"{folder} is damaged: {damage}; choose another checkpoint")
    config = load_config(run / CONFIG_FILE, trust_remote_code=trust_remote_code)
    misfit = find_misfit(folder, config.method, run_id_of(run))
    if misfit is not None:
        raise UserError(misfit)
    base, labels = read_base(run, trust_remote_code=trust_remote_code)
    method = METHODS[config.method]
    return Source(
        kind="checkpoint",
        folder=folder,
        base=base,
        method=config.method,
        task=config.task.model_dump(),
        labels=labels,
        adapter=folder if method.needs_adapter else None,
        trajectory=folder / TRAJECTORY_FILE if method.base == "zeroth" else None,
        whole=None if method.needs_adapter else folder,
    )


class _BaseFile(pydantic.BaseModel):
    """The form of `base.json`."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    base: BaseSpec
    labels: list[str]
    run: str | None = None
    watched_rows: str | None = None  # digest of the rows of `watch_task`


def write_base(
    run: Path,
    base: BaseSpec,
    labels: Sequence[str],
    run_id: str | None,
    watched_rows: str | None = None,
) -> None:
    """Write `base.json`, so that a checkpoint of the run loads without the data of the task."""
    watched = {} if watched_rows is None else {"watched_rows": watched_rows}
    values = {"base": vars(base), "labels": list(labels), "run": run_id, **watched}
    write_json(run / BASE_FILE, values)


def _read_base_file(run: Path) -> _BaseFile:
    values = read_json(run / BASE_FILE)
    with refusing(f"{run / BASE_FILE} is damaged"):
        return _BaseFile.model_validate_json(json.dumps(values))


def run_id_of(run: Path) -> str | None:
    """The identifier of a run, which its checkpoints name; None in folders of older versions.

    Raises:
        UserError: if `base.json` is damaged.
    """
    return _read_base_file(run).run if (run / BASE_FILE).exists() else None


def watched_rows_of(run: Path) -> str | None:
    """The digest of the rows of a run's `watch_task`; None if it has none.

    Raises:
        UserError: if `base.json` is damaged.
    """
    return _read_base_file(run).watched_rows if (run / BASE_FILE).exists() else None


def read_base(run: Path, *, trust_remote_code: bool = False) -> tuple[BaseSpec, tuple[str, ...]]:
    """The base that a run began with, and the names of the classes.

    Runs of older versions have no `base.json`. Their artefact records both. If there is none, they
    follow from the configuration, the data and the model.

    Args:
        run: the run folder.
        trust_remote_code: whether code from the model's repository may run to find the head.

    Raises:
        UserError: if the file is damaged, the data cannot be read, or code is not allowed.
    """
    if (run / BASE_FILE).exists():
        found = _read_base_file(run)
        return found.base, tuple(found.labels)
    if (run / ARTIFACT_FOLDER / HEADER_FILE).exists():
        header = read_header(run / ARTIFACT_FOLDER)
        return BaseSpec(**header["base"]), tuple(header["labels"])
    from zofo.tasks.load import load_splits

    config = load_config(run / CONFIG_FILE, trust_remote_code=trust_remote_code)
    tokenizer = config.model.tokenizer() if config.task.name == "chat" else None
    splits = load_splits(config.task, seed=config.seed, tokenizer=tokenizer)
    return base_of(config, splits), splits.labels


def base_of(config: RunConfig, splits: Splits) -> BaseSpec:
    """The base that a configuration names.

    Raises:
        UserError: if the model has a classification head and the task has no fixed classes.
    """
    model, head = config.model, config.model.head
    if head == "auto":
        head = head_of(
            model.name, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    if head == "classification" and splits.kind != "classification":
        raise UserError(
            f"{model.name} with a classification head cannot do task {config.task.name}, which has "
            "no fixed classes; choose a decoder, such as smollm2-135m"
        )
    return BaseSpec(
        model.name,
        head=head,
        dtype=model.dtype,
        num_labels=max(2, len(splits.labels)),
        seed=config.seed,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        attn_implementation=model.attn_implementation,
        quantization=model.quantization,
    )
