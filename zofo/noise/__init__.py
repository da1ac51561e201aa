"""Directions v: addressed random signs or normal numbers, and the passes that use them.

philox          the counter-based generator, as a readable reference
combine         w + Σ_k c_k v_k in one pass: what every user of the noise calls
backends        the choice of kernels for a device
kernels, cpu    compiled kernels for the CPU, and their launch
kernel_*        what the CPU kernels draw, and the number formats that they read and write
triton_*        kernels for CUDA
"""
