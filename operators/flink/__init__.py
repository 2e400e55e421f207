"""The Flink side of the operators: callbacks are translated, decisions are made elsewhere."""
