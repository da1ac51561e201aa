"""Download artefacts from the Hugging Face hub, and upload them."""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath
from typing import Any, Final

from zofo.disk.files import bytes_digest, json_digest, json_text, read_json_object
from zofo.errors import UserError
from zofo.models.embedded import ALIASES
from zofo.saved.manifest import (
    ADAPTER_FOLDER,
    CARD_FILE,
    HEADER_FILE,
    MODEL_FOLDER,
    SINGLE_FILES,
    check_files,
    find_artifact,
    read_header,
)
from zofo.tasks.files import SUFFIXES

_FOLDERS: Final = (f"{ADAPTER_FOLDER}/*", f"{MODEL_FOLDER}/*")
# Other files of a repository or folder are neither loaded nor published.
_PATTERNS: Final = [HEADER_FILE, CARD_FILE, *SINGLE_FILES, *_FOLDERS]


def looks_like_hub_id(name: str) -> bool:
    """Whether a name has the form OWNER/NAME."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def download(repo_id: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """Download an artefact, or take it from the cache if the hub cannot be reached.

    Raises:
        UserError: if the hub has no such repository, or it is unreachable and the cache is empty.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repo_id, revision=revision, token=token, allow_patterns=_PATTERNS
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{repo_id} is not a local folder and cannot be downloaded from the hub "
            f"({_first_line(error)}); give a run folder, an artefact, or a hub id"
        ) from error
    return Path(folder)


def push_to_hub(
    folder: str | Path, repo_id: str, *, private: bool = False, token: str | None = None
) -> str:
    """Check that an artefact is undamaged, and upload it.

    Of local paths only the last part is uploaded. Whoever loads an artefact with a local base needs
    the base in a folder of that name.

    Args:
        folder: an artefact, or a run folder that holds one.
        repo_id: OWNER/NAME of the repository; it is created if it does not exist.
        private: whether a newly created repository is private.
        token: token of the hub; None for the one that `hf auth login` stored.

    Returns:
        The URL of the commit.

    Raises:
        UserError: if the artefact is damaged, or the hub is unreachable or refuses the upload.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = find_artifact(folder)
    header = read_header(folder)
    check_files(folder, header)
    contents = _public_contents(folder, header)
    api: Any = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, content) for name, content in contents.items()],
            commit_message="Upload a zofo artefact",
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{repo_id} cannot be written ({_first_line(error)}); check the name, the token "
            "('hf auth login') and the connection"
        ) from error
    return str(commit.commit_url)


def public_name(name: str) -> str | None:
    """The hub id of a model; None for a local folder, whose name must not be published."""
    if name in ALIASES:
        return ALIASES[name].origin
    return name if looks_like_hub_id(name) and not Path(name).exists() else None


def _public_contents(folder: Path, header: dict[str, Any]) -> dict[str, str | bytes]:
    """Name of each published file -> its path, or its content without local paths."""
    names = sorted([*header["files"], *(n for n in (CARD_FILE,) if (folder / n).is_file())])
    contents: dict[str, str | bytes] = {name: str(folder / name) for name in names}
    digests = dict(header["files"])
    configs = re.compile(rf"({ADAPTER_FOLDER}|{MODEL_FOLDER})/\w*config\.json")
    for name in filter(configs.fullmatch, header["files"]):
        values = read_json_object(folder / name, has_nan=True)
        paths = {k: _last_part(v) for k, v in values.items() if k.endswith("name_or_path")}
        if paths != {key: values[key] for key in paths}:
            content = contents[name] = json_text({**values, **paths}).encode()
            digests[name] = bytes_digest(content)
    base, task = header["base"], header["task"]
    public = {**header, "base": {**base, "name": _last_part(base["name"])}, "files": digests}
    if task is not None:
        # A folder "./x/y" is no hub id, as "x/y" might be.
        folder_of_rows = task.get("data_dir") and _last_part(f"./{task['data_dir']}")
        rows = {key: _last_part(task.get(key)) for key in ("train", "dev", "test")}
        public["task"] = {**task, **rows, "data_dir": folder_of_rows}
    public["digest"] = json_digest({k: v for k, v in public.items() if k != "digest"})
    return {**contents, HEADER_FILE: json_text(public).encode()}


def _last_part(name: Any) -> Any:
    """The last part of a path; hub ids and values that are no names stay."""
    if not isinstance(name, str):
        return name
    if public_name(name) is not None and not name.lower().endswith(SUFFIXES):
        return name
    return PureWindowsPath(name).name or name  # It knows both kinds of slashes.


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
