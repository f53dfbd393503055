"""Float weights go in, packed buffers come out; nothing is left half done."""
