"""Capture, model sources, recipe, and the pipeline that joins passes and targets into a bundle."""
