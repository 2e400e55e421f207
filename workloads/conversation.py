"""Generated conversations: a transcript only grows at its end, so each prompt is a prefix of the next.

Lengths are UTF-8 bytes. All text is ASCII, so one byte is one character.
"""

from random import Random

ADVERBS = ("quietly", "often", "rarely", "carefully", "suddenly", "usually", "slowly", "together")
VERBS = ("follows", "carries", "answers", "crosses", "measures", "finds", "keeps", "paints", "repairs", "remembers")
NOUNS = (
    "river", "engine", "garden", "market", "signal", "teacher", "window", "harbour", "letter", "mountain",
    "train", "island", "bridge", "kitchen", "forest", "clock", "painter", "lantern", "orchard", "village",
)  # fmt: skip
ADJECTIVES = ("old", "narrow", "bright", "distant", "patient", "wooden", "northern", "hidden", "gentle", "early")
LINKS = ("near", "behind", "without", "before", "under", "beside")


def made_text(random: Random, length: int) -> str:
    """Return sentences of exactly `length` bytes in all, which end with a full stop. Empty for a length of 0."""
    text = ""
    while len(text) < length:
        text += _sentence(random) + " "
    return text[: max(length - 1, 0)].rstrip(" ").ljust(length, ".")


def system_text(seed: int, length: int) -> str:
    """Return the line of `length` bytes with which every prompt of a workload begins; empty for a length of 0."""
    return made_text(Random(f"{seed}/system"), length - 1) + "\n" if length else ""


class Conversation:
    """One session's transcript. Its text depends only on the seed and the session's id, not on other sessions.

    The load is an open loop that never waits for an answer, so the history has a generated reply of the requested
    length instead. The transcript has the form `<system>User: ...\\nAssistant: ...\\nUser: ...\\nAssistant:`.
    """

    def __init__(self, seed: int, session_id: str, system: str, turn_tokens: int, reply_tokens: int) -> None:
        self.session_id = session_id
        self._random = Random(f"{seed}/{session_id}")
        self._turn_tokens = turn_tokens
        self._reply_tokens = reply_tokens
        self._prompt = ""
        self._opening = system
        self._next_turn = self._made_turn()

    @property
    def next_prompt_tokens(self) -> int:
        """Length of the next turn's prompt."""
        return len(self._prompt) + len(self._opening) + len(self._next_turn)

    def next_prompt(self) -> str:
        """Append the user's next turn; return the whole transcript up to the assistant's turn."""
        self._prompt += self._opening + self._next_turn
        # The reply is exactly as long as the requested answer, with the space and without the line end.
        self._opening = made_text(self._random, self._reply_tokens - 1).rjust(self._reply_tokens) + "\n"
        self._next_turn = self._made_turn()
        return self._prompt

    def _made_turn(self) -> str:
        spread = self._turn_tokens // 2
        length = self._random.randint(self._turn_tokens - spread, self._turn_tokens + spread)
        return turn(made_text(self._random, length))


def turn(text: str) -> str:
    return f"User: {text}\nAssistant:"


def longest_turn_tokens(turn_tokens: int) -> int:
    """Length of the longest turn for a mean of `turn_tokens`, labels included."""
    return len(turn("")) + turn_tokens + turn_tokens // 2


def _sentence(random: Random) -> str:
    subject, verb, target = random.choice(NOUNS), random.choice(VERBS), random.choice(NOUNS)
    words = ["the", random.choice(ADJECTIVES), subject, random.choice(ADVERBS), verb, "the", target]
    if random.random() < 0.5:
        words += [random.choice(LINKS), "the", random.choice(ADJECTIVES), random.choice(NOUNS)]
    return " ".join(words).capitalize() + "."
