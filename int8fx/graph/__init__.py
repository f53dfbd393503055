"""Reads matrix products out of any FX graph, and writes int8 ops in their place."""
