"""What the compilers make of the Triton kernels."""
