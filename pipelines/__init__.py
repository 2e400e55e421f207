"""One Flink job a file; `job.build` describes the graph that they share, `main()` is what `flink run -py` calls."""
