"""Directions v: random signs or normal numbers, each a function of its address.

philox            the counter-based generator, as a readable reference
combine           w + Σ_k c_k v_k in one pass: the functions that all other rooms call
rank_one          directions a bᵀ of matrices, as the signs a and b
backends          the choice of kernels for a device
kernels, cpu      compiled kernels for the CPU, and their launch
kernel_draws      the directions that the CPU kernels draw
kernel_formats    the number formats that they read and write
triton_kernels    kernels for CUDA; triton_launch launches them
"""
