"""Kernels in Triton, for CUDA devices. Loaded only there, and by tests under Triton's interpreter."""
