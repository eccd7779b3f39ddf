"""Triton kernels for CUDA, each the fused twin of plain torch code that stands beside its caller.

Imported only where a policy or trainer runs on a GPU: a machine without one has no Triton.
"""
