"""The continuous batching of `transformers`, in process: all requests are added at once, then answers are read."""

from collections.abc import Callable
from typing import Any

from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from benchmarks.baselines.padded import cut
from benchmarks.baselines.worker import Answers, Order, WorkerConfig, run_worker
from inference_service.model import LoadedModel
from inference_service.prompts import prompt_tokens

PAGE_TOKENS = 32
POLL_S = 1.0


class TransformersContinuous:
    """Does what `generate_batch` does, but request by request, so that each can have its own answer length."""

    def __init__(self, model: LoadedModel, config: WorkerConfig) -> None:
        self._model = model
        self._eos_ids = sorted(model.eos_token_ids) or [-1]
        self._prompts: dict[str, tuple[list[int], int]] = {}
        engine = config.engine
        # By default it would take most of the machine's memory. It gets twice the size of our pool, so that the share
        # of pages that its scheduler keeps free never delays a request.
        pages = 2 * config.batch * -(-model.max_len // PAGE_TOKENS)
        self._manager: Any = model.model.init_continuous_batching(
            GenerationConfig(  # type: ignore[no-untyped-call]
                do_sample=False, eos_token_id=self._eos_ids, pad_token_id=model.tokenizer.pad_token_id
            ),
            ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=pages,
                max_batch_tokens=max(engine.step_prefill_tokens, config.batch),
                max_requests_per_batch=config.batch,
            ),
        )
        self._manager.warmup()
        self._manager.start()
        self._prompts = {str(row): ([1] * (8 + row), 4) for row in range(config.batch)}
        self.answer(lambda: False)

    def prepare(self, order: Order) -> None:
        self._prompts = {
            request.request_id: (prompt_tokens(request, self._model), request.max_new_tokens)
            for request in order.requests
        }

    def answer(self, stopped: Callable[[], bool]) -> Answers:
        for request_id, (prompt, limit) in self._prompts.items():
            self._manager.add_request(prompt, request_id=request_id, max_new_tokens=limit)
        answers: Answers = {}
        while len(answers) < len(self._prompts):
            result = self._manager.get_result(timeout=POLL_S)
            if result is None:
                if not self._manager.is_running():
                    raise RuntimeError("the library's generation thread has ended")
            elif result.error is not None:
                raise RuntimeError(f"the library failed a request: {result.error}")
            elif result.is_finished():
                limit = self._prompts[result.request_id][1]
                answers[result.request_id] = cut(result.generated_tokens, limit, self._eos_ids)
        return answers

    def close(self) -> None:
        self._manager.stop(block=True)


if __name__ == "__main__":
    run_worker("transformers_continuous", TransformersContinuous)
