"""The load: seeded conversations, trace replays, open-loop arrivals, and the generator that sends requests to Kafka."""
