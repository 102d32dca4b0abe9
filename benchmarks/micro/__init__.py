"""Micro-benchmarks of the engine's parts, with pytest-benchmark; the ordinary test run leaves them out."""
