"""The experiments of the convergence study: design and claims of each."""
