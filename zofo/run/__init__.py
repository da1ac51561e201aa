"""One training run from a configuration."""
