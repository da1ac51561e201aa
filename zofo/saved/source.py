"""A trained model on disk, whatever keeps it: a run folder, an artefact, or a run's checkpoint.

base      as it was before training, by name
adapter   peft's files, if the method moves one
history   the base's trajectory, if zeroth-order steps moved it
whole     the whole model, if its history is not at hand or not needed
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from zofo.config.load import load_config
from zofo.config.schema import RunConfig
from zofo.disk.files import refusing
from zofo.errors import UserError
from zofo.models.loading import head_of
from zofo.optim.blocks import split_parameters
from zofo.optim.methods import METHODS, methods_that
from zofo.optim.trajectory import TRAJECTORY_FILE, Trajectory, check_base
from zofo.saved.artifact import HEADER_FILE, BaseSpec, read_header
from zofo.saved.checkpoint_folders import find_damage
from zofo.saved.layout import CONFIG_FILE, STATE_FILE
from zofo.saved.manifest import ADAPTER_FOLDER, MODEL_FOLDER, find_artifact
from zofo.tasks.spec import Splits


@dataclass(frozen=True)
class Source:
    """Where the parts of a trained model lie.

    Attributes:
        kind: "artefact" or "checkpoint".
        folder: the artefact's or checkpoint's.
        base: the base it was trained from.
        method: how.
        task: the task's options, None if it was trained on none of zofo's.
        labels: names of the classes.
        adapter: folder of the adapter.
        trajectory: file of the base's history.
        whole: folder of the whole model.
        base_fingerprint: of the base before training, where the header has it.
        trust_remote_code: run the code of a base that needs some.
    """

    kind: str
    folder: Path
    base: BaseSpec
    method: str
    task: dict[str, Any] | None
    labels: tuple[str, ...]
    adapter: Path | None
    trajectory: Path | None
    whole: Path | None
    base_fingerprint: str | None
    trust_remote_code: bool = False

    def history(self) -> Trajectory:
        """The base's updates.

        Raises:
            UserError: if the method records none, or the file is damaged.
        """
        if self.trajectory is None:
            raise UserError(
                f"{self.folder} was trained by {self.method}, which records no steps of the base; "
                f"only {methods_that(lambda m: m.base == 'zeroth', joined_by='and')} do"
            )
        return Trajectory.load(self.trajectory)[0]

    def expected_fingerprint(self) -> str | None:
        """Of the base before training, from the header or the trajectory."""
        if self.base_fingerprint is not None or self.trajectory is None:
            return self.base_fingerprint
        found = Trajectory.load(self.trajectory)[1].get("base_fingerprint")
        return None if found is None else str(found)

    def load_start(self) -> tuple[nn.Module, Any]:
        """The base before training with the trained adapter on it, and the tokenizer.

        Raises:
            UserError: if the base cannot be loaded, is another, or the adapter does not fit it.
        """
        model, tokenizer = self.base.load()
        if self.adapter is not None:
            model = attach(model, self.adapter)
        expected = self.expected_fingerprint()
        if expected is not None:
            check_base(split_parameters(model).base, expected, str(self.folder))
        return model, tokenizer

    def plain_tokenizer(self) -> Any:
        """The tokenizer as its owner saved it, without what training sets."""
        import transformers as hf

        from zofo.console import quiet
        from zofo.models.loading import resolve

        is_saved = self.whole is not None and (self.whole / "tokenizer_config.json").is_file()
        name = str(self.whole) if is_saved else resolve(self.base.name)
        with refusing(f"the tokenizer of {name} cannot be loaded"), quiet():
            return hf.AutoTokenizer.from_pretrained(
                name,
                revision=None if is_saved else self.base.revision,
                trust_remote_code=self.base.trust_remote_code,
            )

    def load(self) -> tuple[nn.Module, Any]:
        """The trained model in evaluation mode, and the tokenizer.

        Raises:
            UserError: as `load_start`, or if the history or the whole model is damaged.
        """
        if self.kind == "artefact":
            from zofo.saved.artifact import load

            artifact = load(self.folder, trust_remote_code=self.trust_remote_code)
            return artifact.model, artifact.tokenizer
        if self.whole is not None:
            from zofo.models.loading import load_tokenizer

            values = {**vars(self.base), "name": str(self.whole), "revision": None}
            tokenizer = load_tokenizer(
                self.base.name,
                revision=self.base.revision,
                trust_remote_code=self.base.trust_remote_code,
            )
            return _load_whole(values, tokenizer), tokenizer
        model, tokenizer = self.load_start()
        if self.trajectory is not None:
            self.history().replay(split_parameters(model).base)
        return model.eval(), tokenizer


def open_source(path: str | Path, *, trust_remote_code: bool = False) -> Source:
    """Find a trained model.

    Args:
        path: a run folder that ended, an artefact, or `checkpoint-N` in a run folder.
        trust_remote_code: run code that the base's repository brings, if the base needs that.

    Raises:
        UserError: if it is none of these, or damaged.
    """
    path = Path(path).expanduser()
    source = _checkpoint(path) if is_checkpoint(path) else _artifact(find_artifact(path))
    if source.base.runs_remote_code and not trust_remote_code:
        raise UserError(
            f"{path} needs code from the repository of {source.base.name}; pass trust_remote_code "
            "if you trust its authors"
        )
    return dataclasses.replace(source, trust_remote_code=trust_remote_code)


def _artifact(folder: Path) -> Source:
    header = read_header(folder)
    method = METHODS[header["method"]]
    return Source(
        "artefact",
        folder,
        BaseSpec(**header["base"]),
        header["method"],
        header.get("task"),
        tuple(header.get("labels") or ()),
        folder / ADAPTER_FOLDER if method.needs_adapter else None,
        folder / TRAJECTORY_FILE if method.base == "zeroth" else None,
        folder / MODEL_FOLDER if method.base == "first" else None,
        header.get("base_fingerprint"),
    )


def is_checkpoint(path: Path) -> bool:
    """Whether it is a checkpoint in Trainer's layout."""
    return (path / STATE_FILE).is_file() and not (path / HEADER_FILE).is_file()


def attach(model: nn.Module, folder: Path) -> nn.Module:
    """The adapter of a folder on a base, as peft does it, without its remarks.

    Raises:
        UserError: if it does not fit.
    """
    import peft

    from zofo.console import quiet

    with (
        refusing(f"the adapter in {folder} cannot be attached", "check the base and the folder"),
        quiet(),
    ):
        return peft.PeftModel.from_pretrained(model, str(folder))


def plain_base(
    source: Source,
    *,
    stop: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """The base alone, moved by the recorded updates.

    Args:
        source: one whose base `Source.load_start` has checked.
        stop: how many updates; None: all, none where the method records none.
        progress: called with the numbers of weights done and to be done.
    """
    plain, _ = source.base.load()
    if source.trajectory is not None:
        base = split_parameters(plain).base
        source.history().replay(base, stop=stop, progress=progress)
    return plain.eval()


def drop_weights(model: nn.Module, weights: Iterable[nn.Parameter] | None = None) -> None:
    """Free the memory of a model that is done with, whoever still holds it.

    Args:
        model: not to be used again, except for its other parameters.
        weights: the parameters that go; None: all.
    """
    for parameter in model.parameters() if weights is None else weights:
        parameter.data = parameter.data.new_empty(0)


def _checkpoint(folder: Path) -> Source:
    run = folder.resolve().parent
    if not (run / CONFIG_FILE).is_file():
        raise UserError(
            f"{folder} is a checkpoint outside a run folder of zofo, so its base is not known; "
            "load it with zofo.load_checkpoint(base, folder)"
        )
    damage = find_damage(folder)
    if damage is not None:
        raise UserError(f"{folder} is not whole: {damage}; choose another checkpoint")
    config = load_config(run / CONFIG_FILE)
    base, labels = _base_of_run(run)
    method = METHODS[config.method]
    return Source(
        "checkpoint",
        folder,
        base,
        config.method,
        config.task.model_dump(),
        labels,
        folder if method.needs_adapter else None,
        folder / TRAJECTORY_FILE if method.base == "zeroth" else None,
        None if method.needs_adapter else folder,
        None,
    )


def _base_of_run(run: Path) -> tuple[BaseSpec, tuple[str, ...]]:
    """From the artefact if the run ended, else from the configuration and its data."""
    if (run / "artifact" / HEADER_FILE).is_file():
        header = read_header(run / "artifact")
        return BaseSpec(**header["base"]), tuple(header.get("labels") or ())
    from zofo.models.loading import load_tokenizer
    from zofo.tasks.load import load_splits

    config = load_config(run / CONFIG_FILE)
    tokenizer = load_tokenizer(config.model.name) if config.task.name == "chat" else None
    splits = load_splits(config.task, seed=config.seed, tokenizer=tokenizer)
    return base_of(config, splits), splits.labels


def _load_whole(values: dict[str, Any], tokenizer: Any) -> nn.Module:
    """A model saved without its tokenizer."""
    from zofo.console import quiet
    from zofo.models.loading import DTYPES, model_class, prepare

    kwargs: dict[str, Any] = {}
    if values["head"] == "classification":
        kwargs["num_labels"] = values["num_labels"]
    if values["attn_implementation"] is not None:
        kwargs["attn_implementation"] = values["attn_implementation"]
    with refusing(f"the model in {values['name']} cannot be loaded"), quiet():
        model = model_class(values["head"]).from_pretrained(
            values["name"],
            dtype=DTYPES[values["dtype"]],
            trust_remote_code=values["trust_remote_code"],
            **kwargs,
        )
    prepare(model, tokenizer)
    return model.eval()


def base_of(config: RunConfig, splits: Splits) -> BaseSpec:
    """The base that a configuration names.

    Raises:
        UserError: if its head does not suit the model.
    """
    model = config.model
    head = model.head
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
    )
