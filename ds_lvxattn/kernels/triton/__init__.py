"""Triton kernels: interval attention, and what surrounds it in an exchange (merge, delta, surrogate output)."""
