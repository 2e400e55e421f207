"""The next token from logits. The seed is the request's own, so that a moved or repeated request answers the same."""

import torch

from core.records import Request


class Sampler:
    """Greedy at temperature 0, else a draw from the softmax with a generator seeded by the request."""

    def __init__(self, request: Request) -> None:
        self._temperature = request.temperature
        self._generator = torch.Generator().manual_seed(request.seed) if request.temperature > 0 else None

    @property
    def greedy(self) -> bool:
        return self._generator is None

    def sample(self, logits: torch.Tensor) -> int:
        """A token id from `logits` `[vocabulary]`."""
        if self._generator is None:
            return int(logits.argmax())
        # On the CPU in float64 wherever the model runs: one generator, one sequence of draws on every device.
        scores = logits.double().cpu()
        # Shifted before the division, by a temperature that is no less than the least normal number: else 0 / 0.
        probabilities = torch.softmax((scores - scores.max()) / max(self._temperature, 1e-300), dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))
