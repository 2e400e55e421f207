"""Experiments: run named variants of a job, keep raw records, make CSV and figure. Jobs are only submitted to Flink."""
