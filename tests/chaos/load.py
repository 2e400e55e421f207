"""The load of a scenario, the ledger of its outcomes, and the expected answers."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from kafka import KafkaProducer

from benchmarks.conversations import SteadyConversations
from core.clock import SystemClock
from core.records import DeadLetter, Request, Response
from experiments.collector import Ledger
from inference_service.completion import Completion
from inference_service.continuous_engine import ContinuousEngine
from inference_service.transformers_engine import load_checked_model
from operators.config import JobConfig
from workloads.timed_request import TimedRequest

COPY_EVERY = 10
COPY_AFTER_MS = 700.0
"""Delay of a client's retry: the second record comes while the first is answered, or after a fault between them."""
BURST = (0.3, 0.7)
"""Share of the requests that come in a burst."""
PATIENCE_MS = 120_000
"""Maximum time to deliver a record, long enough for a restart of the broker."""


@dataclass(frozen=True)
class LoadShape:
    """The load to offer. It has conversations, so that chunks are reused."""

    requests: int
    rate_per_s: float
    seed: int
    patience_s: float = 90.0
    """Maximum wait for the next answer."""
    max_new_tokens: int = 24
    system_tokens: int = 96
    turns: int = 4
    burst_factor: float = 1.0

    @property
    def conversations(self) -> SteadyConversations:
        return SteadyConversations(
            requests=self.requests,
            rate_per_s=self.rate_per_s,
            seed=self.seed,
            turns=self.turns,
            system_tokens=self.system_tokens,
            max_new_tokens=self.max_new_tokens,
        )


class SteadyLoad:
    """Conversations with the scenario's own ids, with an optional burst. Every tenth request is sent twice."""

    def __init__(self, name: str, shape: LoadShape) -> None:
        self._name = name
        self._shape = shape

    @property
    def requests(self) -> int:
        return self._shape.requests + self.copies

    @property
    def copies(self) -> int:
        """Number of requests that are sent twice."""
        return -(-self._shape.requests // COPY_EVERY)

    def adjustments(self) -> Mapping[str, int]:
        return {}

    def __iter__(self) -> Iterator[TimedRequest]:
        copies: deque[TimedRequest] = deque()
        at_ms = 0.0
        for index, timed in enumerate(self._shape.conversations):
            while copies and copies[0].at_ms <= at_ms:
                yield copies.popleft()
            request = replace(timed, at_ms=at_ms, request_id=f"{self._name}/{timed.request_id}")
            yield request
            if index % COPY_EVERY == 0:
                copies.append(replace(request, at_ms=at_ms + COPY_AFTER_MS))
            at_ms += self._gap_ms(index)
        yield from copies

    def _gap_ms(self, index: int) -> float:
        gap_ms = 1000 / self._shape.rate_per_s
        begin, end = (part * self._shape.requests for part in BURST)
        return gap_ms / self._shape.burst_factor if begin <= index < end else gap_ms


@dataclass(frozen=True)
class ReceivedRecord:
    """An answer or a dead letter, with the time at which the reader had it."""

    received_ms: float
    record: Response | DeadLetter


class Book(Ledger):
    """A ledger that also keeps every outcome, duplicates included, with the time at which it was read."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: list[ReceivedRecord] = []
        self.requests: dict[str, Request] = {}

    def sent(self, request: Request) -> None:
        self.requests.setdefault(request.request_id, request)
        super().sent(request)

    def response(self, response: Response) -> None:
        self.outcomes.append(ReceivedRecord(SystemClock().wall_ms(), response))
        super().response(response)

    def dead_letter(self, letter: DeadLetter) -> None:
        self.outcomes.append(ReceivedRecord(SystemClock().wall_ms(), letter))
        super().dead_letter(letter)

    @property
    def doubled(self) -> list[str]:
        """Ids of requests with more than one outcome."""
        counts = Counter(one.record.request_id for one in self.outcomes)
        return [name for name, count in counts.items() if count > 1 and name is not None]

    @property
    def answers(self) -> list[tuple[float, Response]]:
        """Answers with their times, in the order of receipt."""
        return [(one.received_ms, one.record) for one in self.outcomes if isinstance(one.record, Response)]


class Reference:
    """Answers of the bare engine, without cache, Flink, Kafka and faults. Equal requests are computed once."""

    def __init__(self, job: JobConfig) -> None:
        engine = job.engine
        loaded = load_checked_model(engine)
        self.model = loaded.name
        self._engine = ContinuousEngine(loaded, engine, None, job.cache.chunk_tokens, SystemClock())
        self._known: dict[tuple[object, ...], tuple[int, ...]] = {}

    def learn(self, requests: Iterable[Request]) -> None:
        """Compute the answers to all requests, which the model must be able to answer."""
        new = {_question(request): request for request in requests if _question(request) not in self._known}
        for done in self._engine.run(new.values()):
            assert isinstance(done, Completion), done
            self._known[_question(done.request)] = done.token_ids

    def token_ids(self, request: Request) -> tuple[int, ...]:
        """Token ids of the answer to a request that `learn` has seen."""
        return self._known[_question(request)]


def _question(request: Request) -> tuple[object, ...]:
    return request.prompt, request.messages, request.prompt_token_ids, request.max_new_tokens


@contextmanager
def patient_producer(brokers: str) -> Iterator[KafkaProducer]:
    """Give a producer that loses and repeats no record while the broker is away for a while."""
    producer = KafkaProducer(
        bootstrap_servers=brokers.split(","),
        acks="all",
        enable_idempotence=True,
        linger_ms=0,
        max_request_size=4 << 20,
        max_block_ms=PATIENCE_MS,
        request_timeout_ms=5_000,
        reconnect_backoff_max_ms=500,
        delivery_timeout_ms=PATIENCE_MS,
    )
    try:
        yield producer
    finally:
        producer.close(timeout=5)
