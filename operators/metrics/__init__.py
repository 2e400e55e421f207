"""What a slot counts and measures, for Prometheus and for Flink."""
