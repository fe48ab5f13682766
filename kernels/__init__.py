"""CUDA C++ kernels and their Python launchers; nothing yet."""
