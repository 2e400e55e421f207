"""The phases workload: the number of users grows and falls, so the right size of the cache changes during the run."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random

from core.errors import UserError
from workloads.config import WorkloadConfig
from workloads.conversation import Conversation, longest_turn_tokens, system_text
from workloads.timed_request import TimedRequest, request_id


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the load that lasts until `until_percent` of the requests are sent."""

    until_percent: int
    users: int
    interval_divisor: int

    @property
    def favoured_users(self) -> int:
        """Number of favoured users: the first 60 % of a small population, rounded up; none of a large one."""
        return -(-self.users * 3 // 5) if self.users <= SMALL_POPULATION else 0


PHASES = (Phase(15, 3, 2), Phase(35, 8, 2), Phase(55, 25, 2), Phase(75, 40, 3), Phase(100, 5, 3))
SMALL_POPULATION = 5
FAVOURED_SHARE = 0.8
"""Share of requests that the favoured users make."""


def phase_of(index: int, requests: int) -> Phase:
    """The phase of request `index` (from 0) among `requests`."""
    return next(phase for phase in PHASES if 100 * index < phase.until_percent * requests)


class PhasesWorkload:
    """`config.requests` requests of generated conversations, `base_interval_ms / interval_divisor` apart."""

    def __init__(self, config: WorkloadConfig) -> None:
        options = config.phases
        least = options.system_prompt_tokens + longest_turn_tokens(options.turn_tokens)
        if config.max_prompt_tokens < least:
            raise UserError(
                f"--max-prompt-tokens: {config.max_prompt_tokens} does not hold the system prompt and one turn; "
                f"give at least {least}, or lower --system-prompt-tokens or --turn-tokens"
            )
        self._config = config
        self._restarts = 0

    @property
    def requests(self) -> int:
        return self._config.requests

    def adjustments(self) -> Mapping[str, int]:
        return {"restarted_sessions": self._restarts}

    def __iter__(self) -> Iterator[TimedRequest]:
        config = self._config
        random = Random(f"{config.seed}/arrivals")
        sessions = _Sessions(config)
        self._restarts = 0
        at_ms = 0.0
        for index in range(config.requests):
            phase = phase_of(index, config.requests)
            user_id = f"user-{_pick_user(random, phase):02d}"
            conversation = sessions.of(user_id, random.randint(1, config.phases.sessions_per_user))
            self._restarts = sessions.restarts
            yield TimedRequest(
                at_ms=at_ms,
                request_id=request_id("phases", config.seed, index),
                session_id=conversation.session_id,
                user_id=user_id,
                max_new_tokens=config.max_new_tokens,
                prompt=conversation.next_prompt(),
            )
            at_ms += config.phases.base_interval_ms / phase.interval_divisor


class _Sessions:
    """The current conversation of each user's session. A fresh one replaces a conversation that has grown too long."""

    def __init__(self, config: WorkloadConfig) -> None:
        self._config = config
        self._system = system_text(config.seed, config.phases.system_prompt_tokens)
        self._conversations: dict[str, Conversation] = {}
        self._generations: dict[str, int] = {}
        self.restarts = 0

    def of(self, user_id: str, session: int) -> Conversation:
        name = f"{user_id}/s{session}"
        conversation = self._conversations.get(name)
        if conversation is None:
            conversation = self._begin(name)
        elif conversation.next_prompt_tokens > self._config.max_prompt_tokens:
            self.restarts += 1
            conversation = self._begin(name)
        return conversation

    def _begin(self, name: str) -> Conversation:
        generation = self._generations[name] = self._generations.get(name, 0) + 1
        session_id = name if generation == 1 else f"{name}-{generation}"
        conversation = self._conversations[name] = Conversation(
            self._config.seed, session_id, self._system, self._config.phases.turn_tokens, self._config.max_new_tokens
        )
        return conversation


def _pick_user(random: Random, phase: Phase) -> int:
    favoured = phase.favoured_users
    if not favoured:
        return random.randint(1, phase.users)
    if random.random() < FAVOURED_SHARE:
        return random.randint(1, favoured)
    return random.randint(favoured + 1, phase.users)
