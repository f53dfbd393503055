"""What Triton's compilers produce for the kernels, on six targets, without a GPU."""
