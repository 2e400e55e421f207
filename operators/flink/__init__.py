"""The Flink functions. They translate callbacks; plain classes elsewhere make the decisions."""
