"""The hybrid step: blocks, estimator, optimizer, trajectory."""
