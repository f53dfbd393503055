"""Replaces float weights by packed buffers. An error or an interruption leaves no module half converted."""
