"""The configuration of a run: its schema, its checks, and how it is read."""
