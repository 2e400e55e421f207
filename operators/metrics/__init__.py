"""Metrics of a slot, for Prometheus and for Flink."""
