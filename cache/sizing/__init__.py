"""Sizing policies: how many chunks the local tier may hold now."""

from cache.config import SizingConfig, Strategy
from cache.sizing.budgeted import Budgeted, Shares
from cache.sizing.fluid import Fluid
from cache.sizing.frequency import Frequency
from cache.sizing.mrc import MRC
from cache.sizing.protocol import SizingPolicy, StoreObserver
from cache.sizing.static import Static

_POLICIES: dict[Strategy, type[Static] | type[Fluid] | type[Frequency] | type[MRC]] = {
    Strategy.STATIC: Static,
    Strategy.FLUID: Fluid,
    Strategy.FREQUENCY: Frequency,
    Strategy.MRC: MRC,
}


def make_sizing(config: SizingConfig, shares: Shares | None = None) -> SizingPolicy:
    """A fresh policy as `config` describes it; MRC with `shares` follows them."""
    if shares is not None and config.strategy is Strategy.MRC:
        return Budgeted(config, shares)
    return _POLICIES[config.strategy](config)


__all__ = ["MRC", "Budgeted", "Fluid", "Frequency", "Shares", "SizingPolicy", "Static", "StoreObserver", "make_sizing"]
