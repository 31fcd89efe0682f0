"""The operations that the model is built on: attention, the gated delta rule, and the cross-entropy of the head.

Each has a naive form, which says what it computes token by token, a fast form in PyTorch, and Triton kernels in
`triton/`. A caller calls one function; which form runs is decided here, by device, dtype and shape.
"""
