"""How smooth a model's loss is, block by block."""
