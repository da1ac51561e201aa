"""What the theory claims, measured: `zofo convergence`.

problems      finite sums with known constants               zofo.convergence.problems
engine        many seeds and rates of one problem            kernels (compiled), reference
cells         one problem in one setting, kept on disk
experiments   the table of cells
fits          tuned values and exponents, with intervals
measures      what is read off cells
claims        the table of claims, and their verdicts
page          figures and table in one file
"""
