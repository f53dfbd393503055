"""Examines the code that Triton compiles the kernels to, for six targets, without a GPU."""
