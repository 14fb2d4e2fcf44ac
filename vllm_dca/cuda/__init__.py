"""DCA on CUDA: Triton kernels, and flash-attention as the provider of a pass.

They need torch and Triton alone, and run on a machine without a GPU under Triton's
interpreter (TRITON_INTERPRET=1), which is how the tests check them.
"""
