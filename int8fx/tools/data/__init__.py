"""Models and texts for the tools."""
