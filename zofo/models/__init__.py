"""Models, tokenizers and adapters."""
