"""What all packages share: records, access to Kafka and Redis, options, clock and errors. Imports no other package."""
