"""Measurements of the engine and its cache by themselves, outside Flink, with real tensors and a real Redis."""
