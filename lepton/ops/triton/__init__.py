"""Triton kernels. Each file is imported only where its kernels run: LEPTON runs without Triton too."""
