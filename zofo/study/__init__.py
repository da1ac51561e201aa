"""Grids of runs: what came of them, in tables and statistics."""
