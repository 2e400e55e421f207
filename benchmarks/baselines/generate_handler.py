"""`generate` as a model of Apache Beam's RunInference, and the place for its answers.

Beam copies a handler. The copies import a module other than the main program instead of copying it. So they find here
the one model that was loaded before the clock started.
"""

# Only a part of Beam has types.
# mypy: disable-error-code="no-untyped-call,type-arg"

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from apache_beam.ml.inference.base import ModelHandler

from benchmarks.baselines.padded import answer_in_no_time, answer_together
from benchmarks.baselines.worker import Answers
from inference_service.model import LoadedModel

Example = tuple[str, list[int], int]
"""Request id, prompt, maximum length of the answer."""

models: list[LoadedModel] = []
answers: Answers = {}


class GenerateHandler(ModelHandler):
    """Calls `generate` once for each group of up to `batch` requests that Beam forms."""

    def __init__(self, batch: int, zero_time: bool = False) -> None:
        super().__init__()
        self._batch = batch
        self._answer_together = answer_in_no_time if zero_time else answer_together

    def load_model(self) -> LoadedModel:
        return models[0]

    def run_inference(
        self, batch: Sequence[Example], model: LoadedModel, inference_args: dict[str, Any] | None = None
    ) -> Iterable[tuple[str, list[int]]]:
        made = self._answer_together(model, [prompt for _, prompt, _ in batch], [limit for _, _, limit in batch])
        return [(request_id, answer) for (request_id, _, _), answer in zip(batch, made, strict=True)]

    def batch_elements_kwargs(self) -> Mapping[str, Any]:
        # Full groups from the start, instead of Beam's search for a size.
        return {"min_batch_size": self._batch, "max_batch_size": self._batch}


def collect(answered: tuple[str, list[int]]) -> None:
    request_id, token_ids = answered
    answers[request_id] = token_ids
