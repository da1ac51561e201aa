"""Evaluate the model at x + eps v without writing to x."""
