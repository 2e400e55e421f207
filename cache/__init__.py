"""A two-level cache of key/value chunks: a local tier in the slot's process, and Redis behind it.

`cache.manager.open_cache` opens a cache. `cache.protocol` defines its interface and needs only PyTorch.
"""
