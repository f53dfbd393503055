"""Reads matmuls with a weight out of any FX graph, and replaces them by int8 ops."""
