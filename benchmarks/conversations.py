"""A load that can last for ever although its sessions end: a new conversation replaces each that has ended."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from workloads.conversation import Conversation, longest_turn_tokens, system_text
from workloads.timed_request import TimedRequest, request_id


@dataclass(frozen=True)
class SteadyConversations:
    """`requests` requests at even gaps, from `sessions` conversations in turn, with `turns` requests each.

    No id is used twice. All prompts begin with the same system text, and each extends the one before it in its session.
    """

    requests: int
    rate_per_s: float
    seed: int
    sessions: int = 8
    turns: int = 5
    system_tokens: int = 96
    turn_tokens: int = 24
    max_new_tokens: int = 16

    @property
    def longest_prompt_tokens(self) -> int:
        """Maximum length of a prompt, in tokens of a byte-level tokenizer."""
        reply = self.max_new_tokens + 1
        return self.system_tokens + self.turns * longest_turn_tokens(self.turn_tokens) + (self.turns - 1) * reply

    def adjustments(self) -> Mapping[str, int]:
        return {}

    def __iter__(self) -> Iterator[TimedRequest]:
        system = system_text(self.seed, self.system_tokens)
        open_: dict[int, Conversation] = {}
        for index in range(self.requests):
            place, turn = index % self.sessions, index // self.sessions
            # Conversations must not all end at the same time.
            if place not in open_ or (turn + place) % self.turns == 0:
                session_id = f"session-{self.seed}-{index:08d}"
                open_[place] = Conversation(self.seed, session_id, system, self.turn_tokens, self.max_new_tokens)
            conversation = open_[place]
            yield TimedRequest(
                at_ms=1000 * index / self.rate_per_s,
                request_id=request_id("steady", self.seed, index),
                session_id=conversation.session_id,
                user_id=f"user-{place}",
                max_new_tokens=self.max_new_tokens,
                prompt=conversation.next_prompt(),
            )
