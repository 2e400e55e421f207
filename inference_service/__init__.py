"""The engine: one model over one pool of key/value slots, prefilled one by one and decoded together."""
