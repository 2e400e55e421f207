"""A two-level cache of key/value chunks: the local tier in the operator's process, Redis behind it.

`cache.manager.open_cache` makes one; `cache.protocol` says what it promises, and needs nothing but PyTorch.
"""
