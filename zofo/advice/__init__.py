"""Learning rates and smoothing radius from short measurements."""
