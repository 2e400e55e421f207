"""One Flink job per file. `job.build` makes the graph that they share; `flink run -py` calls `main()`."""
