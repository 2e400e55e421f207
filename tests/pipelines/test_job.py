"""Reasons to refuse a job, in one line each."""

import pytest
from kafka import KafkaAdminClient
from kafka.admin import NewTopic
from pyflink.util.exceptions import TableException

from core.errors import UserError
from core.kafka_config import KafkaConfig
from core.records import MAX_RESULT_BYTES
from local_stack import LocalStack
from operators.config import Delivery, DeliveryConfig, JobConfig
from pipelines import connectors
from pipelines.connectors import check_transactions, ensure_topics
from pipelines.job import refusals_in_a_line

NO_CONNECTOR = """\
org.apache.flink.table.api.ValidationException: Unable to create a source for reading table 'requests'.
\tat org.apache.flink.table.factories.FactoryUtil.createDynamicTableSource(FactoryUtil.java:171)
Caused by: org.apache.flink.table.api.ValidationException: Could not find any factory for identifier 'kafka' that \
implements 'org.apache.flink.table.factories.DynamicTableFactory' in the classpath.
\tat org.apache.flink.table.factories.FactoryUtil.discoverFactory(FactoryUtil.java:591)
"""


def test_what_flink_refuses_is_a_line_with_its_cause() -> None:
    with (
        pytest.raises(UserError, match=r"factory for identifier 'kafka' .*; add --ship-connector$") as told,
        refusals_in_a_line(),
    ):
        raise TableException(NO_CONNECTOR)
    assert "\n" not in str(told.value)
    refused = "java.net.ConnectException: Connection refused"
    with pytest.raises(UserError) as told, refusals_in_a_line():
        raise TableException(f"a.B: no\n\tat x\nCaused by: {refused}\n\tat y\n")
    assert str(told.value) == f"Flink: {refused}"


class Silent:
    """A broker that hides its settings, which the client takes for an answer."""

    def describe_cluster(self) -> dict[str, list[dict[str, int]]]:
        return {"brokers": [{"broker_id": 1}]}

    def describe_configs(self, asked: list[object], config_filter: str) -> dict[str, dict[str, dict[str, object]]]:
        return {"broker": {"1": {}}}

    def close(self) -> None:
        pass


def test_brokers_that_do_not_tell_their_limit_are_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connectors, "_admin", lambda kafka: Silent())
    check_transactions(JobConfig(delivery=DeliveryConfig(delivery=Delivery.EXACTLY_ONCE)))


@pytest.mark.integration
def test_a_topic_that_would_refuse_what_the_job_writes_is_told(stack: LocalStack) -> None:
    brokers = stack.addresses().brokers
    kafka = KafkaConfig(brokers=brokers, topic_prefix="narrow", consumer_group="narrow")
    admin = KafkaAdminClient(bootstrap_servers=brokers)
    try:
        admin.create_topics([NewTopic(kafka.dead_letters_topic, 1, 1, topic_configs={"max.message.bytes": "1000000"})])
        with pytest.raises(UserError, match=r"^topic narrow\.dead-letters: its max\.message\.bytes is 1000000"):
            ensure_topics(JobConfig(kafka=kafka))
        admin.delete_topics([kafka.dead_letters_topic])
        wide = {"max.message.bytes": str(MAX_RESULT_BYTES)}
        other = kafka.model_copy(update={"topic_prefix": "wide"})
        admin.create_topics([NewTopic(other.responses_topic, 1, 1, topic_configs=wide)])
        ensure_topics(JobConfig(kafka=other))
        # Topics that it has created itself have the right settings.
        ensure_topics(JobConfig(kafka=other))
    finally:
        admin.close()
