"""The building blocks of every HTML page of zofo."""
