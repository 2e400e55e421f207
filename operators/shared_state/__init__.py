"""State that the slots of a job share in Redis: queue lengths, and the gain of more cache chunks."""
