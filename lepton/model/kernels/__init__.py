"""Triton kernels, each in a file that is imported only where it is used: LEPTON runs without Triton too."""
