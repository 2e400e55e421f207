"""Starts, probes and stops Kafka, Redis and Flink on this machine. Imports only `core`."""

from local_stack.config import StackConfig
from local_stack.flink import flink_cli
from local_stack.stack import Addresses, LocalStack

__all__ = ["Addresses", "LocalStack", "StackConfig", "flink_cli"]
