"""Run every step of loading a folder, and report the result of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from zofo.disk.files import refusing
from zofo.errors import UserError
from zofo.models.saved_adapters import attach_adapter
from zofo.saved.assemble import STEPS, Assembly, require_finite
from zofo.saved.checkpoint_folders import find_bad_pickle
from zofo.saved.export import load_plain
from zofo.saved.export_card import Record, read_record
from zofo.saved.export_check import Samples, logits_of
from zofo.saved.inspect import check_export_files, kind_of
from zofo.saved.manifest import ADAPTER_FOLDER
from zofo.saved.source import open_source


@dataclass(frozen=True)
class Check:
    """The result of one step of `verify`."""

    name: str
    is_sound: bool | None  # whether the check passed; None if it was not tried
    detail: str  # the result in words


def verify(path: str | Path, *, trust_remote_code: bool = False) -> Iterator[Check]:
    """Run the steps of loading one by one; after a failure, the rest are reported as not tried.

    Args:
        path: a run, artefact, checkpoint or export.
        trust_remote_code: whether to run code from the base's repository, if the base needs it.

    Raises:
        UserError: if the folder is none of these.
    """
    folder = Path(path).expanduser()
    steps = (
        _export_steps(folder, trust_remote_code)
        if kind_of(folder) == "export"
        else _source_steps(folder, trust_remote_code)
    )
    has_failed = False
    for name, step in steps:
        if has_failed:
            yield Check(name, None, "not tried, because an earlier check failed")
            continue
        try:
            with refusing(name, "a file is damaged or zofo has a bug; copy the files again"):
                detail = step()
        except UserError as error:
            has_failed = True
            yield Check(name, False, str(error))
        else:
            if detail is not None:
                yield Check(name, True, detail)


def _source_steps(
    folder: Path, trust_remote_code: bool
) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Name and action of each check of a run, artefact or checkpoint."""
    opened: list[Assembly] = []  # filled by `header`, which runs first

    def header() -> str:
        source = open_source(folder, trust_remote_code=trust_remote_code)
        opened.append(Assembly(source))
        return f"{source.kind} of method {source.method} on {source.base.name}"

    def step(name: str) -> Callable[[], str | None]:
        return lambda: getattr(opened[0], name)()

    def state() -> str | None:
        if opened[0].parts.header is not None:  # An artefact has no files of Trainer.
            return None
        bad = find_bad_pickle(opened[0].parts.folder)
        if bad is not None:
            raise UserError(
                f"{bad} is damaged, or holds objects other than tensors and numbers; do not resume "
                "from this checkpoint"
            )
        return "Trainer's own files hold tensors and numbers only"

    def run_model() -> str:
        samples = Samples((tuple(range(8)),), (), "")
        if not all(bool(x.isfinite().all()) for x in logits_of(opened[0].model.eval(), samples)):
            raise UserError("the model's logits are not finite")
        return "the model runs and its logits are finite"

    yield "header", header
    yield STEPS[0], step(STEPS[0])
    yield "state", state
    for name in STEPS[1:]:
        yield name, step(name)
    yield "model", run_model


def _export_steps(
    folder: Path, trust_remote_code: bool
) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Name and action of each check of an export."""
    opened: list[Record] = []  # filled by `header`, which runs first

    def header() -> str:
        opened.append(read_record(folder))
        return f"export of method {opened[0].method} on {opened[0].base}"

    def files() -> str:
        note = check_export_files(folder, opened[0])
        return note or "every file has the recorded digest"

    def load() -> str:
        model, _ = load_plain(folder, opened[0].head, trust_remote_code=trust_remote_code)
        if not opened[0].is_merged:
            model = attach_adapter(model, folder / ADAPTER_FOLDER)
        require_finite(model, folder)
        return "the model loads with plain transformers and its weights are finite"

    yield "header", header
    yield "files", files
    yield "model", load
