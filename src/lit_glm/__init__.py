"""Benchmark of a device: fine-tunes GLM on ReCoRD, and records speed and accuracy."""

__version__ = "0.2.0"
