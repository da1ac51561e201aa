"""The built-in tasks, one file a family."""
