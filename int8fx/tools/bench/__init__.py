"""``int8fx bench``: int8fx against its peers and against the limits of this machine.

    timing      interleaved rounds, and what they measured
    limits      the most that this CPU can do (limits.cpp)
    settings    the command's options
    candidates  linear layers by int8fx and by each peer
    products    suites of single products: products, outliers, schemes, overhead, scaling
    models      suites of language models: models; profile (by kind of kernel); memory (a separate process each)
    cuda        the suites on a GPU
    check       the Triton kernels on a GPU against the reference
    suites      all suites, by name
    report      tables and CSV
    plots       PNG
    command     runs the chosen suites

The command owns its process: it resets torch's compile caches between cases and sets the number of threads on request.
"""
