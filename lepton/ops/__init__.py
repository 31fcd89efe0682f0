"""The operations that the model is built on: attention, the gated delta rule, and the cross-entropy of the head.

Each has three forms: a naive one, which defines the result token by token, a fast one in PyTorch, and Triton kernels
in `triton/`. There is one function to call; it chooses the form by device, dtype and shape.
"""
