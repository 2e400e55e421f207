"""The attention function that models call by name, and the pass that computes it.

`transformers` lets a model call an attention function by name. Ours hands the call to the current pass, together with
the function that the library itself would use: SDPA, or the eager function of the model's own module where SDPA cannot
do what the model needs (softcapped scores, attention sinks). Outside of a pass it is that function.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, Any]]
"""The library's function for one layer: query, key, value and mask to output (and weights)."""

SDPA, EAGER = "infertuner_packed", "infertuner_packed_eager"
OURS = {"sdpa": SDPA, "eager": EAGER}
"""Our attention implementation for each one of the library. Their names avoid "sdpa": if a model has no SDPA, the
library refuses every implementation with that in its name."""


class AttentionPass(Protocol):
    """Computes the attention of one forward pass."""

    def attend(
        self,
        compute: Compute,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """`[batch, heads, tokens, head_dim]` of each to `[batch, tokens, heads, head_dim]`."""

    def note_mask(self, mask: torch.Tensor, mask_function: Callable[..., Any], local_size: int | None) -> None:
        """The model has made `mask` by a function of the library, for some of its layers."""


_current: ContextVar[AttentionPass | None] = ContextVar("attention_pass", default=None)


@contextmanager
def computed_by(attention_pass: AttentionPass) -> Iterator[None]:
    """Let `attention_pass` compute the attention of forward passes within the block."""
    token = _current.set(attention_pass)
    try:
        yield
    finally:
        _current.reset(token)


def _eager_attention_forward(module: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
    return sys.modules[type(module).__module__].eager_attention_forward(module, *arguments, **options)


def _attention_by(function: Callable[..., Any]) -> Callable[..., Any]:
    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> Any:
        compute = partial(function, module, **options)
        attention_pass = _current.get()
        if attention_pass is None:
            return compute(query, key, value, attention_mask)
        return attention_pass.attend(compute, query, key, value, attention_mask), None

    return attention


def _mask_by(make: Callable[..., torch.Tensor | None]) -> Callable[..., torch.Tensor | None]:
    def attention_mask(*arguments: Any, **options: Any) -> torch.Tensor | None:
        attention_pass = _current.get()
        if attention_pass is None:
            return make(*arguments, **options)
        mask = make(*arguments, **{**options, "allow_is_causal_skip": False})
        assert mask is not None  # only skipped masks are none
        attention_pass.note_mask(mask, options["mask_function"], options.get("local_size"))
        return mask

    return attention_mask


for _name, _function, _make_mask in (
    (SDPA, sdpa_attention_forward, sdpa_mask),
    (EAGER, _eager_attention_forward, eager_mask),
):
    AttentionInterface.register(_name, _attention_by(_function))
    AttentionMaskInterface.register(_name, _mask_by(_make_mask))
