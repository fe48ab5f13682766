"""The ModelRunner on the project's own CUDA kernels."""
