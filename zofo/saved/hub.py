"""Download artefacts from the Hugging Face hub, and upload them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from zofo.errors import UserError
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
    from huggingface_hub import HfApi

    folder = find_artifact(folder)
    check_files(folder, read_header(folder))
    api: Any = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            allow_patterns=_PATTERNS,
            commit_message="Upload a zofo artefact",
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{repo_id} cannot be written ({_first_line(error)}); check the name, the token "
            "('hf auth login') and the connection"
        ) from error
    return str(commit.commit_url)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
