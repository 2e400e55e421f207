"""Chooses the inference operator for a configuration."""

from pyflink.datastream import KeyedProcessFunction

from operators.config import Batching, JobConfig
from operators.flink.continuous import ContinuousFunction
from operators.flink.micro_batch import MicroBatchFunction


def inference_function(config: JobConfig) -> KeyedProcessFunction:
    """The inference operator for the kind of batching that `config` names."""
    kinds = {Batching.MICRO: MicroBatchFunction, Batching.CONTINUOUS: ContinuousFunction}
    return kinds[config.batching.batching](config)
