"""Benchmarks of engine, cache, batching, placement and pipeline, and of alternatives, side by side in one run."""
