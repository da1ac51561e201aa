"""The theory as working tools: smoothness, advice, problems with known constants, convergence."""
