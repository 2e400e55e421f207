"""A two-level cache of key/value chunks: the local tier in the operator's process, Redis behind it."""
