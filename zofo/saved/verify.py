"""Tries everything that loading a folder does, and says what was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zofo.disk.files import read_json, refusing
from zofo.errors import UserError
from zofo.optim.blocks import split_parameters
from zofo.optim.trajectory import check_base
from zofo.saved.artifact import read_header
from zofo.saved.export import load_plain
from zofo.saved.export_card import EXPORT_FILE
from zofo.saved.export_check import Samples, logits_of
from zofo.saved.inspect import check_export_files, kind_of
from zofo.saved.manifest import ADAPTER_FOLDER, check_files, find_artifact
from zofo.saved.source import Source, attach, open_source


@dataclass(frozen=True)
class Check:
    """One step of `verify`.

    Attributes:
        name: what was looked at.
        is_sound: None if an earlier failure kept it from being tried.
        detail: what was found.
    """

    name: str
    is_sound: bool | None
    detail: str


def verify(path: str | Path, *, trust_remote_code: bool = False) -> Iterator[Check]:
    """Do what loading does, check by check, and stop trying at the first that fails.

    Args:
        path: a run, artefact, checkpoint or export.
        trust_remote_code: run code that the base's repository brings, if the base needs that.

    Raises:
        UserError: if it is none of these.
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
            yield Check(name, None, "not tried")
            continue
        try:
            with refusing(name, "this is a fault of zofo's or of the files; copy them again"):
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
    opened: list[Source] = []
    model: Any = None

    def header() -> str:
        opened.append(open_source(folder, trust_remote_code=trust_remote_code))
        source = opened[0]
        return f"{source.kind} of method {source.method} on {source.base.name}"

    def files() -> str | None:
        if opened[0].kind == "artefact":
            found = find_artifact(folder)
            check_files(found, read_header(found))
        return "every digest holds"  # a checkpoint's were compared when it was opened

    def history() -> str | None:
        if opened[0].trajectory is None:
            return None
        return f"{len(opened[0].history())} updates of the base, digest holds"

    def base() -> str | None:
        nonlocal model
        if opened[0].whole is not None and opened[0].trajectory is None:
            return None
        model = opened[0].base.load()[0]
        return f"{opened[0].base.name} loads"

    def adapter() -> str | None:
        nonlocal model
        if opened[0].adapter is None:
            return None
        model = attach(model, opened[0].adapter)
        return f"{len(split_parameters(model).adapter)} tensors attached"

    def fingerprint() -> str | None:
        expected = opened[0].expected_fingerprint()
        if model is None or expected is None:
            return None
        check_base(split_parameters(model).base, expected, str(folder))
        return f"{expected} is that of the base"

    def replay() -> str | None:
        if opened[0].trajectory is None:
            return None
        opened[0].history().replay(split_parameters(model).base)
        _require_finite(model)
        return "every update applies, weights are finite"

    def whole() -> str:
        nonlocal model
        if model is None or opened[0].whole is not None:
            model = None  # one of them at a time
            model = opened[0].load()[0]
        samples = Samples((tuple(range(8)),), (), "")
        if not all(bool(x.isfinite().all()) for x in logits_of(model.eval(), samples)):
            raise UserError("the model's logits are not finite")
        return "the model runs, logits are finite"

    yield "header", header
    yield "files", files
    yield "history", history
    yield "base", base
    yield "adapter", adapter
    yield "fingerprint", fingerprint
    yield "replay", replay
    yield "model", whole


def _export_steps(
    folder: Path, trust_remote_code: bool
) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Name and action of each check of an export."""
    record: dict[str, Any] = {}

    def header() -> str:
        record.update(read_json(folder / EXPORT_FILE))
        return f"export of method {record['method']} on {record['base']}"

    def files() -> str:
        check_export_files(folder, record["is_merged"])
        return "all there, headers readable"

    def whole() -> str:
        model, _ = load_plain(folder, record["head"], trust_remote_code=trust_remote_code)
        if not record["is_merged"]:
            model = attach(model, folder / ADAPTER_FOLDER)
        _require_finite(model)
        return "loads with plain transformers, weights are finite"

    yield "header", header
    yield "files", files
    yield "model", whole


def _require_finite(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise UserError(f"the weight {name!r} is not finite")
