"""``int8fx bench``: times int8fx, other libraries and the limits of this machine.

    timing      interleaved rounds and their results
    limits      int8 peak and bandwidth of this CPU (limits.cpp)
    settings    the command's options
    candidates  linear layers of int8fx and of each other library
    products    suites of single linear layers: products, outliers, schemes, overhead, fallback, scaling
    models      suites of models: models (language models, a text encoder); profile (by kind of kernel); memory (a
                separate process each)
    cuda        the suites on a GPU
    check       the Triton kernels on a GPU against the reference
    suites      all suites, by name
    report      tables and CSV
    plots       PNG
    command     runs the chosen suites

The command owns its process: it resets torch's compile caches between cases and sets the number of threads on request.
"""
