"""Common alternatives to our job. Each runs in its own processes on the same model."""
