"""Sessions in bursts, as block ids. Most chunks that a burst leaves in the cache are useless in the lull after it."""

import random
from collections.abc import Iterator

from workloads.block_trace import BlockRequest

BLOCK_TOKENS = 32
SYSTEM_BLOCKS = 8
"""Blocks of the system prompt, with which all prompts begin."""
LONGEST_BLOCKS = 60
"""Maximum blocks of a session. A session that has grown longer ends."""
BURST_S, LULL_S = 20.0, 40.0
"""Mean durations; each burst and lull lasts 2 s longer."""


def bursts(requests: int, seed: int) -> Iterator[BlockRequest]:
    """Generate a load that switches between bursts and lulls, as BurstGPT does (Wang et al., 2024).

    Gaps between requests follow a gamma distribution with a coefficient of variation above one. A burst brings 8
    requests per second from up to 30 sessions, a lull 0.7 per second from up to 4.
    """
    dice = random.Random(seed)
    system = tuple(range(SYSTEM_BLOCKS))
    made = SYSTEM_BLOCKS
    sessions: list[list[int]] = []
    at_s = left_s = 0.0
    on = False
    for _ in range(requests):
        if left_s <= 0:
            on = not on
            left_s = 2 + dice.expovariate(1 / (BURST_S if on else LULL_S))
        gap_s = dice.gammavariate(0.5, 2 / (8.0 if on else 0.7))
        at_s, left_s = at_s + gap_s, left_s - gap_s
        most = 30 if on else 4
        del sessions[:-most]
        is_new = len(sessions) < most or dice.random() < 0.15
        if is_new:
            sessions.append([])
            del sessions[:-most]
        session = sessions[-1] if is_new else dice.choice(sessions)
        grown = (dice.randint(3, 9) if is_new else 0) + dice.randint(1, 3)
        session += range(made, made + grown)
        made += grown
        blocks = (*system, *session)
        yield BlockRequest(at_s * 1000, blocks, len(blocks) * BLOCK_TOKENS, BLOCK_TOKENS)
        if len(session) > LONGEST_BLOCKS:
            sessions.remove(session)
