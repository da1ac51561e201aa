"""The folders that a run writes: checkpoints, artefacts and exports."""
