"""Artefacts on the Hugging Face hub: there and back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from zofo.errors import UserError
from zofo.optim.trajectory import TRAJECTORY_FILE
from zofo.saved.manifest import ADAPTER_FOLDER, CARD_FILE, HEADER_FILE, MODEL_FOLDER

_PATTERNS: Final = [
    HEADER_FILE,
    TRAJECTORY_FILE,
    CARD_FILE,
    f"{ADAPTER_FOLDER}/*",
    f"{MODEL_FOLDER}/*",
]


def looks_like_hub_id(name: str) -> bool:
    """Whether a name has the form OWNER/NAME."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def download(repo_id: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """A local copy of an artefact on the hub; from the cache when the hub cannot be reached.

    Raises:
        UserError: if there is none, or it can neither be reached nor is cached.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repo_id, revision=revision, token=token, allow_patterns=_PATTERNS
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{repo_id} is no folder here and cannot be had from the hub ({_first_line(error)}); "
            "give a run folder, an artefact, or a hub id that this machine can reach or has cached"
        ) from error
    return Path(folder)


def push_to_hub(
    folder: str | Path, repo_id: str, *, private: bool = False, token: str | None = None
) -> str:
    """Upload an artefact, after checking that it is whole.

    Args:
        folder: an artefact, or a run folder that holds one.
        repo_id: OWNER/NAME; made if it does not exist.
        private: who may see a repository that is made now.
        token: of the hub; None: the one that `hf auth login` stored.

    Returns:
        The address of the commit.

    Raises:
        UserError: if it is damaged, or the hub cannot be reached or says no.
    """
    from huggingface_hub import HfApi

    from zofo.saved.manifest import check_files, find_artifact, read_header

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
            f"{repo_id} cannot be written ({_first_line(error)}); look at the name, the token "
            "('hf auth login') and the connection"
        ) from error
    return str(commit.commit_url)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
