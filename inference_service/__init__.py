"""The engine: one model over one pool of key/value rows, with continuous batching."""
