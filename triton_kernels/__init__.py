"""int8fx's Triton kernels, always imported as ``int8fx.triton_kernels``."""

if __name__ != "int8fx.triton_kernels":
    raise ImportError("import int8fx.triton_kernels: the bare name is triton-lang's package")
