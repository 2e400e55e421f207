"""Placement, batching and inference slots as plain classes, with thin Flink functions around them."""
