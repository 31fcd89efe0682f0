"""Triton kernels. Each file is imported only where its kernels run, since LEPTON also runs without Triton."""
