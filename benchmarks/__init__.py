"""Speed, side by side in one run: engine, cache, batching, placement and pipeline, and what others use today."""
