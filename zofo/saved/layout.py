"""The names of the files and folders in a run folder.

`zofo.saved.manifest` names those of an artefact, `zofo.optim.trajectory` that of the trajectory.
"""

from __future__ import annotations

from typing import Final

CONFIG_FILE: Final = "run.yaml"
BASE_FILE: Final = "base.json"
"""The base as it was before training, and the names of the classes."""
ENVIRONMENT_FILE: Final = "environment.json"
ADVICE_FILE: Final = "advise.json"
METRICS_FILE: Final = "metrics.jsonl"
STOPPED_FILE: Final = "stopped.json"
RESULT_FILE: Final = "result.json"
ARTIFACT_FOLDER: Final = "artifact"

CHECKPOINT_PREFIX: Final = "checkpoint-"
ACCOUNTS_FILE: Final = "zofo_accounts.json"
"""The sums behind the logged losses, and the run that a checkpoint belongs to."""
STATE_FILE: Final = "trainer_state.json"
ORIGINAL_BASE_FILE: Final = "base_original.safetensors"
SNAPSHOT_FILE: Final = "base_snapshot.safetensors"
BUFFERS_FILE: Final = "base_buffers.safetensors"
"""Buffers that training has changed, in a checkpoint or an artefact."""
REFERENCE_FILE: Final = "preference_reference.safetensors"
"""In a checkpoint: log-likelihoods of the answers of preference pairs before training."""
BASE_COPIES: Final = (ORIGINAL_BASE_FILE, SNAPSHOT_FILE)
"""Copies of the base that a run keeps until it ends."""

WRITTEN_WHOLE: Final = (
    CONFIG_FILE,
    BASE_FILE,
    ENVIRONMENT_FILE,
    ADVICE_FILE,
    METRICS_FILE,
    STOPPED_FILE,
    RESULT_FILE,
    *BASE_COPIES,
)
"""Files of a run folder that `zofo.disk.files.replacing` writes, through temporary files."""
