"""Theory as working tools."""
