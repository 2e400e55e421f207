"""What begins, what waits, and what a step computes. No tensor is touched here.

A step computes one token of every running sequence and pieces of prompts, up to a budget of tokens (iteration level
scheduling: Orca, OSDI 2022; chunked prefill and hybrid batches under a token budget: Sarathi-Serve, OSDI 2024).
"""

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from inference_service.active_sequence import ActiveSequence
from inference_service.rows import RowTable

MOST_PARTIAL = 4
"""Prompts that may be computed in pieces at a time; more would only finish later."""
MOST_PASS_TOKENS = 2048
"""Maximum prompt tokens per pass when `step_prefill_tokens` is 0. Larger passes need more memory and are no faster: the
GEMMs are compute-bound by then. A single prompt may be longer."""
LONG_SHARE = 0.25
"""Share of the engine's time for prompts that exceed a step's budget, while other sequences decode."""


@dataclass(frozen=True)
class Limits:
    """What a step may spend, and what all sequences may hold."""

    running_tokens: int
    """Prompt and answer tokens of all sequences that have begun."""
    step_tokens: float
    """Prompt tokens per step; may be infinite."""
    piece_ms: float
    """Duration of one piece of a prompt that exceeds `step_tokens`; may be infinite."""
    chunk_tokens: int
    reuses: bool
    """True if computed chunks may be reused by a later request."""


@dataclass(frozen=True)
class Plan:
    """What a step computes beside one token of every running sequence."""

    passes: list[list[ActiveSequence]] = field(default_factory=list)
    """Prompt pieces, by forward pass. Running sequences join the first pass."""
    timed: list[ActiveSequence] = field(default_factory=list)
    """Pieces of long prompts, each in a pass of its own. Its duration decides the size of the next piece."""


class Scheduler:
    """Chooses what a step computes. Sequences begin and leave between steps."""

    def __init__(self, rows: RowTable, limits: Limits) -> None:
        self._rows = rows
        self._limits = limits
        self._queue: list[tuple[tuple[int, int, int], ActiveSequence]] = []
        """A heap of the waiting sequences."""
        self._arrivals = itertools.count()
        self._next_expiry_ms = math.inf
        self.prefill_ms_per_token: float | None = None
        """Average cost of a prompt token; none before the first long prefill."""
        self._decode_ms: float | None = None
        """Average duration of decode-only passes."""
        self._debt_ms = 0.0
        """Time that long prompts have had beyond their share."""
        self._timed_ms = 0.0
        """Duration of the timed pieces in the current step."""

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def waiting_since_ms(self) -> float | None:
        """Arrival of the sequence that has waited longest without having begun; none if none waits."""
        return min((sequence.arrived_ms for _, sequence in self._queue), default=None)

    @property
    def first(self) -> ActiveSequence | None:
        """The head of the queue."""
        return self._queue[0][1] if self._queue else None

    def add(self, sequence: ActiveSequence) -> None:
        """Queue a sequence. A higher priority goes first, then the earlier arrival.

        Further choices of a request keep the place of its first one.
        """
        leader = sequence.leader
        sequence.arrival = next(self._arrivals) if leader is None else leader.arrival
        self._next_expiry_ms = min(self._next_expiry_ms, sequence.ends_ms)
        self._push(sequence)

    def withdraw(self, sequences: Iterable[ActiveSequence]) -> None:
        """Remove the sequences from the queue; those that are not there are passed over."""
        going = {sequence for sequence in sequences if sequence.queued}
        if not going:
            return
        self._queue = [entry for entry in self._queue if entry[1] not in going]
        heapq.heapify(self._queue)
        for sequence in going:
            sequence.queued = False

    def take_late(self, now_ms: float) -> list[ActiveSequence]:
        """Sequences without a first token whose time is over. They leave the queue, but not their rows."""
        if now_ms < self._next_expiry_ms:
            return []
        unstarted = [*(sequence for _, sequence in sorted(self._queue)), *self._rows.prefilling]
        remaining = [sequence for sequence in unstarted if now_ms < sequence.ends_ms]
        self._next_expiry_ms = min((sequence.ends_ms for sequence in remaining), default=math.inf)
        late = [sequence for sequence in unstarted if now_ms >= sequence.ends_ms]
        self.withdraw(late)
        return late

    def plan(self, begin: Callable[[ActiveSequence], bool]) -> Plan:
        """Spend the step's budget on prompts.

        `begin` fills the row of a sequence that begins, and returns false if that failed.

        Half of the budget belongs to the prompt that has been in pieces for longest, so that it ends. The rest first
        goes to prompts that began later, the shortest first, and then to new ones, so that a long prompt does not hold
        short ones. While chunks of a new one are being fetched from Redis, others may begin before it, but its row and
        its tokens stay reserved. If only long prompts are left, the shortest takes a whole pass, whatever the budget.
        """
        chosen: list[ActiveSequence] = []
        prefilling = self._rows.prefilling
        oldest = prefilling[0] if prefilling else None
        left = self._limits.step_tokens
        kept = min(_half(left), self._most_of(oldest)) if oldest is not None else 0.0

        def take(sequence: ActiveSequence, most: float) -> int:
            if self._only_long_prompts():
                most = MOST_PASS_TOKENS if sequence is min(prefilling, key=_shortest) else 0
            sequence.piece_tokens = int(min(most, self._most_of(sequence)))
            if sequence.piece_tokens > 0:
                chosen.append(sequence)
            return sequence.piece_tokens

        for sequence in sorted(prefilling[1:], key=_shortest):
            left -= take(sequence, left - kept)
        room = _Room(self._rows, self._limits.running_tokens)
        passed: list[ActiveSequence] = []
        while left > kept and self._queue:
            sequence = self._queue[0][1]
            if not room.has(sequence) or self._may_reuse(sequence, chosen):
                break
            heapq.heappop(self._queue)
            sequence.queued = False
            if sequence.is_fetching:
                passed.append(sequence)
                room.keep(sequence)
                continue
            sequence.began_with = len(self._rows.running) + len(prefilling) + 1
            # Most of a further choice's prompt is copied.
            is_long = sequence.leader is None and len(sequence.prompt) > self._limits.step_tokens
            sequence.row = room.free_row(is_long=is_long)
            if not begin(sequence):
                continue
            sequence.long = sequence.missing > self._limits.step_tokens
            prefilling.append(sequence)
            left -= take(sequence, left - kept)
            room.give(sequence)
        for sequence in passed:
            self._push(sequence)
        # It has left if another choice of its request could not begin.
        if oldest is not None and not oldest.left:
            take(oldest, left)
        timed = [sequence for sequence in chosen if self._is_timed(sequence)]
        return Plan(_passes([sequence for sequence in chosen if not self._is_timed(sequence)]), timed)

    def learn_pass(self, running: int, tokens: int, took_ms: float) -> None:
        """A pass over so many running sequences and prompt tokens took this long."""
        if not tokens:
            self._decode_ms = _averaged(self._decode_ms, took_ms)
        elif (rows_ms := self._decode_ms if running else 0.0) is not None:
            self.learn_prefill_cost(tokens, took_ms - rows_ms)

    def learn_piece(self, sequence: ActiveSequence, took_ms: float) -> None:
        """The current piece of a long prompt took this long."""
        sequence.ms_per_token = took_ms / sequence.piece_tokens
        self._debt_ms += took_ms
        self._timed_ms += took_ms
        if not sequence.is_scored:
            self.learn_prefill_cost(sequence.piece_tokens, took_ms)

    def learn_prefill_cost(self, tokens: int, took_ms: float) -> None:
        """Average over long prefills. A short one is mostly the fixed cost of a pass."""
        if tokens >= self._limits.chunk_tokens and took_ms > 0:
            self.prefill_ms_per_token = _averaged(self.prefill_ms_per_token, took_ms / tokens)

    def end_step(self, took_ms: float) -> None:
        """The time that a step spent on others earns long prompts their share."""
        others_ms, self._timed_ms = took_ms - self._timed_ms, 0.0
        earned_ms = others_ms * LONG_SHARE / (1 - LONG_SHARE)
        self._debt_ms = max(0.0, self._debt_ms - earned_ms) if self._rows.running else 0.0

    def _push(self, sequence: ActiveSequence) -> None:
        heapq.heappush(self._queue, (_order(sequence), sequence))
        sequence.queued = True

    def _may_reuse(self, sequence: ActiveSequence, chosen: Sequence[ActiveSequence]) -> bool:
        """True if this step computes a chunk that the sequence begins with as well: a step later it can reuse it.

        Such a sequence waits only once, and all that wait for the same chunk wait together: the cache may not keep it.
        """
        if not self._limits.reuses or sequence.waited_for_reuse:
            return False
        tokens = self._limits.chunk_tokens
        for other in chosen:
            end = (other.held // tokens + 1) * tokens
            if other.ends_prompt and end <= len(other.prompt) and _shares(sequence, other, end):
                for _, waiting in self._queue:
                    waiting.waited_for_reuse = waiting.waited_for_reuse or _shares(waiting, other, end)
                return True
        return False

    def _most_of(self, sequence: ActiveSequence) -> int:
        """Prompt tokens that this step's time allows. A prompt within a step's budget is computed whole.

        A budget of tokens alone means milliseconds on one device and a second on another.
        """
        if not self._is_timed(sequence):
            return min(sequence.missing, sequence.most_piece_tokens)
        if self._rows.running and self._debt_ms > 0:
            return 0
        # While nothing runs, only a request that arrives meanwhile would wait.
        time_ms = self._limits.piece_ms if self._rows.running else 2 * self._limits.piece_ms
        cost = sequence.ms_per_token or self.prefill_ms_per_token
        in_time = int(time_ms / cost) if cost else int(self._limits.step_tokens)
        # Passes below the step's budget of tokens cost more per token, and nobody would gain from them here.
        least = int(self._limits.step_tokens) if self._only_long_prompts() else self._limits.chunk_tokens
        return min(sequence.missing, sequence.most_piece_tokens, max(in_time, least))

    def _only_long_prompts(self) -> bool:
        """True if nothing runs, nothing waits, and every prompt that has begun is computed in timed pieces."""
        return not self._rows.running and not self._queue and all(map(self._is_timed, self._rows.prefilling))

    def _is_timed(self, sequence: ActiveSequence) -> bool:
        return sequence.long and not math.isinf(self._limits.piece_ms)


class _Room:
    """What a step has left for sequences that may begin in it: rows, tokens, and prompts in pieces.

    It counts on from what has begun before, as a step may begin hundreds.
    """

    def __init__(self, rows: RowTable, most_tokens: int) -> None:
        """To be made after the step has chosen its pieces of all `prefilling` sequences but the first."""
        prefilling = rows.prefilling
        self._most_tokens = most_tokens
        self._held_tokens = sum(one.weight for one in rows)
        self._partial = sum(one is prefilling[0] or not one.ends_prompt for one in prefilling)
        taken = {one.row for one in prefilling}
        self._rows = deque(row for row in range(len(rows.running), rows.count) if row not in taken)
        self._kept = 0
        """Rows reserved for sequences that wait for chunks while others overtake them."""

    def has(self, sequence: ActiveSequence) -> bool:
        """A sequence that is alone always has room, however heavy it is."""
        return self._held_tokens == 0 or (
            len(self._rows) > self._kept
            and self._partial < MOST_PARTIAL
            and self._held_tokens + sequence.weight <= self._most_tokens
        )

    def keep(self, sequence: ActiveSequence) -> None:
        """Reserve the room of a sequence that others overtake."""
        self._kept += 1
        self._partial += 1
        self._held_tokens += sequence.weight

    def free_row(self, *, is_long: bool) -> int:
        """The lowest free row, next to those that run; for a long prompt the highest, so that no other must swap."""
        return self._rows[-1] if is_long else self._rows[0]

    def give(self, sequence: ActiveSequence) -> None:
        """Take the row and tokens of a sequence that has begun. Its piece for this step has been chosen."""
        self._rows.remove(sequence.row)
        self._partial += not sequence.ends_prompt
        self._held_tokens += sequence.weight


def _order(sequence: ActiveSequence) -> tuple[int, int, int]:
    return -sequence.request.priority, sequence.arrival, sequence.choice


def _shortest(sequence: ActiveSequence) -> tuple[int, int]:
    """Sort key: a higher priority first, then the least left to compute."""
    return -sequence.request.priority, sequence.missing


def _passes(chosen: Iterable[ActiveSequence]) -> list[list[ActiveSequence]]:
    """The chosen in order, in groups of at most `MOST_PASS_TOKENS`; the first one may be empty."""
    groups: list[list[ActiveSequence]] = [[]]
    tokens = 0
    for sequence in chosen:
        if groups[-1] and tokens + sequence.piece_tokens > MOST_PASS_TOKENS:
            groups.append([])
            tokens = 0
        groups[-1].append(sequence)
        tokens += sequence.piece_tokens
    return groups


def _shares(sequence: ActiveSequence, other: ActiveSequence, tokens: int) -> bool:
    """True if the first `tokens` of both prompts are equal and reusable between them."""
    return (
        sequence.reuses
        and sequence.request.cache_salt == other.request.cache_salt
        and tokens < len(sequence.prompt)
        and sequence.prompt[:tokens] == other.prompt[:tokens]
    )


def _half(tokens: float) -> float:
    return tokens if math.isinf(tokens) else tokens // 2


def _averaged(average: float | None, value: float) -> float:
    return value if average is None else 0.8 * average + 0.2 * value
