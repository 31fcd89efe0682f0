"""Continuous batching: sequences, the scheduler that gives them slots and passes, and how many tokens to draft.

The scheduler and the choice of drafts are plain Python: they know neither PyTorch nor a model.
"""
