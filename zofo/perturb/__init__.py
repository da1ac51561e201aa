"""The model seen at x + eps v, without a write to x."""
