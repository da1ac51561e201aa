"""The hybrid step inside transformers.Trainer."""
