"""The decode operator: turns Kafka records into envelopes and dead letters."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from typing import Any

from pyflink.common import Row
from pyflink.datastream import ProcessFunction, RuntimeContext

from core.clock import SystemClock
from core.kafka_config import KafkaConfig
from core.records import DeadLetter
from operators.config import IsolationLevel, JobConfig
from operators.decoding import Decoder
from operators.delivery.deduplicator import Deduplicator
from operators.delivery.kafka_journal import KafkaJournal
from operators.envelope import RecordPosition, WarmUp
from operators.flink.beam_worker import make_lean
from operators.flink.rows import DEAD_LETTERS, WARM_UP, dead_letter_row, element_row
from operators.flink.user_errors import UserErrors
from operators.metrics.slot_metrics import slot_metrics
from operators.placement import BalancedPlacement, PlacementPolicy, SessionAffinity
from operators.shared_state.slot_loads import LoadReader, SharedLoads


class DecodeFunction(ProcessFunction):
    """Takes rows of `(value, partition, offset)`. Emits envelopes and warm-ups; dead letters leave by a side output."""

    def __init__(
        self, config: JobConfig, keys: Sequence[int], make_journal: Callable[[KafkaConfig], KafkaJournal] = KafkaJournal
    ) -> None:
        self._config = config
        self._keys = keys
        self._make_journal = make_journal
        self._opened = ExitStack()
        """Closed in reverse order. Flink also closes a function whose `open` failed."""
        self._errors = UserErrors()

    def open(self, runtime_context: RuntimeContext) -> None:
        with self._errors.noted():
            self._open(runtime_context)

    def _open(self, runtime_context: RuntimeContext) -> None:
        make_lean()
        slots = self._config.parallelism
        shared = SharedLoads.of(self._config)
        if shared is None:
            placement: PlacementPolicy = SessionAffinity(slots)
        else:
            loads = self._opened.enter_context(closing(LoadReader(shared)))
            placement = BalancedPlacement(slots, self._config.placing, loads)
        copies = None
        if self._config.delivery.dedup_records:
            journal = self._opened.enter_context(closing(self._make_journal(self._config.kafka)))
            committed = self._config.delivery.isolation_level is IsolationLevel.READ_COMMITTED
            copies = Deduplicator(self._config.delivery.dedup_records, journal, committed=committed)
        self._decoder = Decoder(placement, SystemClock(), copies)
        self._metrics = slot_metrics(runtime_context.get_index_of_this_subtask())

    def close(self) -> None:
        self._opened.close()

    def process_element(self, value: Row, ctx: ProcessFunction.Context) -> Iterator[Any]:
        return self._errors.told(lambda: self._process(value))

    def _process(self, value: Row) -> Iterator[Any]:
        raw, partition, offset = value
        if partition == WARM_UP:
            yield element_row(self._keys[offset], WarmUp(offset))
            return
        position = RecordPosition(self._config.kafka.requests_topic, partition, offset)
        decoded = self._decoder.decode(None if raw is None else bytes(raw), position)
        if isinstance(decoded, DeadLetter):
            self._metrics.answered(decoded)
            yield DEAD_LETTERS, dead_letter_row(decoded)
        elif decoded is None:
            self._metrics.duplicates.inc()
        else:
            yield element_row(self._keys[decoded.slot], decoded)
