"""The load side: seeded conversations, trace replay, open-loop arrivals, and the generator that sends them to Kafka."""
