"""The simplest consumer: poll up to a batch of requests, call `generate`, produce the answers, poll again."""

import json
from collections.abc import Callable

from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from benchmarks.baselines.padded import answer_in_no_time, answer_together
from benchmarks.baselines.worker import Answers, Order, WorkerConfig, run_worker
from core.clients import kafka_settings
from core.kafka_config import KafkaAccessConfig
from core.records import Request
from inference_service.model import LoadedModel
from inference_service.prompts import prompt_tokens

POLL_MS = 50


class ConsumerLoop:
    """One consumer with fixed partitions; delivery is at least once."""

    def __init__(self, model: LoadedModel, config: WorkerConfig) -> None:
        self._model = model
        self._batch = config.batch
        self._order = Order()
        self._consumer: KafkaConsumer = None
        self._producer: KafkaProducer = None
        self._answer_together = answer_in_no_time if config.zero_time else answer_together
        self._answer_together(model, [[1] * (8 + row) for row in range(config.batch)], [4] * config.batch)

    def prepare(self, order: Order) -> None:
        """Connect, and check that the topic is empty."""
        self._order = order
        settings = kafka_settings(order.brokers, KafkaAccessConfig())
        self._producer = KafkaProducer(**settings, acks="all")
        self._producer.partitions_for(order.responses_topic)
        self._consumer = KafkaConsumer(
            **settings,
            group_id=order.requests_topic,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            max_poll_records=self._batch,
        )
        self._consumer.assign([TopicPartition(order.requests_topic, number) for number in order.partitions])
        # The first poll finds the group's offsets. If it brought a record, the load would have begun too early.
        if self._consumer.poll(timeout_ms=1000):
            raise RuntimeError(f"{order.requests_topic} is not empty")

    def answer(self, stopped: Callable[[], bool]) -> Answers:
        """Write the answers to the responses topic; return none."""
        try:
            while not stopped():
                polled = self._consumer.poll(timeout_ms=POLL_MS)
                records = [record for of_partition in polled.values() for record in of_partition]
                if records:
                    self._answer([Request.from_json(record.value) for record in records])
        finally:
            self._producer.close()
            self._consumer.close()
        return {}

    def close(self) -> None:
        """Do nothing: nothing is open between two loads."""

    def _answer(self, requests: list[Request]) -> None:
        prompts = [prompt_tokens(request, self._model) for request in requests]
        answers = self._answer_together(self._model, prompts, [request.max_new_tokens for request in requests])
        for request, token_ids in zip(requests, answers, strict=True):
            text = self._model.tokenizer.decode(token_ids, skip_special_tokens=True)
            answer = {"request_id": request.request_id, "text": text, "token_ids": token_ids}
            self._producer.send(
                self._order.responses_topic, key=request.request_id.encode(), value=json.dumps(answer).encode()
            )
        self._producer.flush()


if __name__ == "__main__":
    run_worker("consumer_loop", ConsumerLoop)
