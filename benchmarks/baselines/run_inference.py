"""Apache Beam's RunInference with `generate` as its model, on the runner in this process."""

# Only a part of Beam has types.
# mypy: disable-error-code="no-untyped-call,attr-defined"

from collections.abc import Callable
from typing import Any

import apache_beam as beam
from apache_beam.ml.inference.base import RunInference
from apache_beam.options.pipeline_options import PipelineOptions

from benchmarks.baselines import generate_handler
from benchmarks.baselines.generate_handler import Example, GenerateHandler, collect
from benchmarks.baselines.worker import Answers, Order, WorkerConfig, run_worker
from inference_service.model import LoadedModel
from inference_service.prompts import prompt_tokens


class RunInferencePipeline:
    """Builds a bounded pipeline for each load, before the clock starts."""

    def __init__(self, model: LoadedModel, config: WorkerConfig) -> None:
        generate_handler.models[:] = [model]
        self._model = model
        self._handler = GenerateHandler(config.batch, config.zero_time)
        self._pipeline = self._built([(str(row), [1] * (8 + row), 4) for row in range(config.batch)])
        self.answer(lambda: False)

    def prepare(self, order: Order) -> None:
        requests = order.requests
        self._pipeline = self._built(
            [(one.request_id, prompt_tokens(one, self._model), one.max_new_tokens) for one in requests]
        )

    def answer(self, stopped: Callable[[], bool]) -> Answers:
        generate_handler.answers.clear()
        self._pipeline.run().wait_until_finish()
        return dict(generate_handler.answers)

    def close(self) -> None:
        """Do nothing: a bounded pipeline ends by itself."""

    def _built(self, examples: list[Example]) -> Any:
        # Without these flags Beam would read the command line of this process.
        pipeline = beam.Pipeline(runner="DirectRunner", options=PipelineOptions(flags=[]))
        requests = pipeline | beam.Create(examples, reshuffle=False)
        _ = requests | RunInference(self._handler) | beam.Map(collect)
        return pipeline


if __name__ == "__main__":
    run_worker("run_inference", RunInferencePipeline)
