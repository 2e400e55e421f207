"""Placement, batching and the inference slot as plain classes, and thin Flink functions over them."""
