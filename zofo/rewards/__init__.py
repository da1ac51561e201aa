"""Rewards: functions that score what a model writes, and built-in checkers of its form."""
