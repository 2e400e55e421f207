"""One Flink job a file: `build(env, config)` describes it, `main()` is what `flink run -py` calls."""
