"""The parts that every HTML page of zofo is made of."""
