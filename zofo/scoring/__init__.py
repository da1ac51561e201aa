"""Scores, predictions and generated text of a model."""
