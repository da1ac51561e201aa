"""Measure what the theory claims: `zofo convergence`.

problems      finite sums with known constants
engine        many seeds and rates of one problem (compiled in kernels, checked by reference)
cells         one problem in one setting, stored on disk
experiments   the table of cells
fits          tuned values and exponents, with intervals
measures      numbers computed from cells (also epochs, radius)
claims        the table of claims and their verdicts
page          figures and tables in one file
"""
