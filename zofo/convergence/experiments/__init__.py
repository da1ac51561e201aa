"""The experiments of the convergence study: the design and the claims of each."""
