"""Sizing policies set the capacity of the local tier."""

from cache.config import SizingConfig
from cache.registry import SIZING
from cache.sizing.budgeted import Budgeted, Shares
from cache.sizing.protocol import SizingPolicy, StoreObserver


def make_sizing(config: SizingConfig, shares: Shares | None = None) -> SizingPolicy:
    """A new policy as `config` describes it.

    `shares` grants this slot its part of a shared budget. Only a `config` that shares a budget uses it.
    """
    if shares is not None and config.shares_budget:
        return Budgeted(config, shares)
    policy: SizingPolicy = SIZING.load(config.strategy)(config)
    return policy


__all__ = ["Shares", "SizingPolicy", "StoreObserver", "make_sizing"]
