"""What a run leaves on disk: checkpoints, artefacts, exports."""
