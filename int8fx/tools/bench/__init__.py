"""``int8fx bench``: int8fx against its peers and against the limits of this machine.

    timing      interleaved rounds
    machine     what the machine is, and the most it can do (limits.cpp)
    candidates  one linear layer, by int8fx and by each peer
    products    suites of single products: products, outliers, schemes, overhead, scaling
    models      suites of whole language models: models; profile (by kind of kernel); memory (a fresh process each)
    check, cuda the Triton kernels on a GPU: against the reference, then against peers and the GPU's limits
    report      tables and CSV
    plots       PNG
    command     runs what was asked for

The command owns its process: it resets torch's compile caches between cases and sets the number of threads if asked to.
"""
