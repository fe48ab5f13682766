"""Triton's tensors on one side, plain values on the other."""
