"""The next tokens of all sequences of a pass, chosen together on the model's device.

A token is drawn with uniform numbers from the request's own generator, which is keyed by the seed and counts the
tokens of the answer. So the draw depends on the request's logits alone, and not on what else runs. Where those are
equal in every batch, so are the answers; in float32 they are, up to rounding. In bfloat16 and float16 rounding is
coarse enough that another batch can change a token, greedy or drawn.

Where top-k, top-p or min-p leave few tokens, the drawn one is the first at which their cumulated probabilities exceed
one number. Where nothing is left out, to cumulate a vocabulary costs more than a soft-max of it. There the token is
drawn by rejection (von Neumann, 1951), which is exact too: proposed from a bound on the probabilities, and taken as
often as its own probability stands to that bound. The bound is the largest logit of each group of tokens, so one pass
that compares reads the logits, and only proposed tokens need an exponential.

Order: repetition penalty, presence and frequency penalty and bias, forced and suppressed tokens and those that a
grammar excludes, temperature, top-k, top-p, min-p. Those that `transformers` has follow its logits processors; presence
and frequency penalty and bias are OpenAI's. Of tokens with equal logits a filter keeps all or none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import UserError
from core.records import Sampling
from inference_service.sequence_sampler import PROPOSALS, Draw, Ids

BLOCK = 256
"""Tokens that are reduced to one value before anything is searched for: a search in two levels reads logits once."""
GROUP = 16
"""Tokens that share a bound in rejection sampling. A proposal is taken at least one time in so many."""
_FEW_CANDIDATES = 64
"""The largest logits that are sorted first for top-p. Where the nucleus is larger, more are."""
_NOT_FINITE, _NONE_TAKEN = -1, -2

Sampled = int | UserError | None
"""The result of a row: a token, an error if its grammar leaves none, or None if its logits are not finite."""


_ALLOWED = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(bool)
_LIMITS = torch.from_numpy(np.where(_ALLOWED, np.inf, -np.inf).astype(np.float32))
"""`[256, 8]`: the largest logit that each of 8 tokens may have, by the byte that has their bits."""


@dataclass
class _Groups:
    """Rows of a pass by how their tokens are found."""

    constrained: list[int] = field(default_factory=list)
    unfiltered: list[int] = field(default_factory=list)
    filtered: list[int] = field(default_factory=list)


class BatchSampler:
    """Chooses the tokens of a pass, on the device that its logits are on. Holds nothing of a request."""

    def __init__(self) -> None:
        self._device = torch.device("cpu")
        self._on_cpu = True
        self._memory: dict[torch.dtype, torch.Tensor] = {}
        self._before: list[tuple[torch.Tensor | slice, torch.Tensor]] | None = None
        """Places in the flattened logits that were overwritten, and what was there, if that is to be restored."""

    @torch.inference_mode()
    def sample(
        self, logits: torch.Tensor, draws: Sequence[Draw | None], *, keeps_logits: bool = False
    ) -> list[Sampled]:
        """A token for each row of `logits` `[rows, vocabulary]`; none where a row's logits are not finite.

        A row has an error where its grammar is too complex at this place, or leaves no token.

        A row's logits are finite if their maximum is: impossible tokens may have minus infinity. A row whose draw is
        none gives its largest logit. Overwrites `logits` unless `keeps_logits`. Waits for the device once, at the end,
        but for the rare row of which no proposal was taken; on a CPU, where that costs nothing, more often.
        """
        self._device, self._on_cpu = logits.device, logits.device.type == "cpu"
        groups = _grouped(draws)
        if not (groups.constrained or groups.unfiltered or groups.filtered):
            return [*_known(*largest(logits))]
        logits = logits.float().contiguous()
        hidden, refused = None, {}
        self._before = [] if keeps_logits else None
        if groups.constrained:
            constrained = [(row, draw) for row in groups.constrained if (draw := draws[row]) is not None]
            hidden = self._constrain(logits, constrained)
            refused = self._mask(logits, [(row, draw) for row, draw in constrained if draw.sampler.has_grammar], hidden)
        sampled = len(groups.unfiltered) + len(groups.filtered)
        tokens = torch.zeros(len(logits), dtype=torch.long, device=self._device)
        witness = torch.zeros(len(logits), device=self._device)
        if sampled < len(logits):
            tokens, witness = largest(logits)
        for rows, choose in ((groups.unfiltered, self._unfiltered), (groups.filtered, self._filtered)):
            if not rows:
                continue
            chosen = [draw for row in rows if (draw := draws[row]) is not None]
            if len(rows) == len(logits):
                tokens, witness = choose(logits, chosen)
            else:
                index = self._there(rows, torch.long)
                found, of_found = choose(logits[index], chosen)
                tokens.index_copy_(0, index, found)
                witness.index_copy_(0, index, of_found)
        known = _known(tokens, witness if hidden is None else witness + hidden)
        tokens_or_errors: list[Sampled] = [
            self._drawn_again(logits[row : row + 1], draws[row]) if token == _NONE_TAKEN else token
            for row, token in enumerate(known)
        ]
        for row, error in refused.items():
            tokens_or_errors[row] = error
        for place, before in reversed(self._before or ()):
            if isinstance(place, slice):
                logits.view(-1)[place] = before
            else:
                logits.view(-1).index_copy_(0, place, before)
        return tokens_or_errors

    def _drawn_again(self, logits: torch.Tensor, draw: Draw | None) -> int | None:
        """The token of a row, of `logits` `[1, vocabulary]`, of which no proposal was taken at first."""
        assert draw is not None
        for attempt in count(1):
            (token,) = _known(*self._unfiltered(logits, [draw], attempt))
            if token != _NONE_TAKEN:
                break
        return token

    def _constrain(self, logits: torch.Tensor, draws: Sequence[tuple[int, Draw]]) -> torch.Tensor:
        """Penalise, forbid and force tokens of the given rows, in place.

        Returns `[rows]`: 0, or NaN where that hides a value of the row that is not finite. Penalties and bias hide
        none.
        """
        vocabulary = logits.shape[1]
        flat = logits.view(-1)
        penalised = [(row, draw.sampler.seen(draw.output), draw) for row, draw in draws if draw.sampler.penalised]
        if penalised:
            ids, counts = _flat_ids([(row, seen) for row, seen, _ in penalised], vocabulary)
            penalties = np.repeat([draw.sampler.sampling.repetition_penalty for *_, draw in penalised], counts)
            index, penalty = self._there(ids, torch.long), self._there(penalties, torch.float32)
            scores = self._read(flat, index)
            # An id that is there twice is penalised once: both write the same value.
            flat.index_copy_(0, index, torch.where(scores < 0, scores * penalty, scores / penalty))
        added = [(row, *part) for row, draw in draws for part in draw.sampler.added(draw.output)]
        if added:
            ids, counts = _flat_ids([(row, ids) for row, ids, _ in added], vocabulary)
            parts = [amounts for _, _, amounts in added]
            if sum(counts) < sum(map(len, parts)):
                parts = [amounts[ids < vocabulary] for _, ids, amounts in added]
            amounts = np.concatenate(parts)
            index = self._there(ids, torch.long)
            if self._before is not None:
                self._read(flat, index)
            flat.index_add_(0, index, self._there(amounts, torch.float32))
        hidden = torch.zeros(len(logits), device=self._device)
        for row, draw in draws:
            if forced := draw.sampler.forced(draw.index):
                hidden[row] = 0 * self._read(flat, slice(row * vocabulary, (row + 1) * vocabulary)).amax()
                logits[row] = -torch.inf
                logits[row, list(forced)] = 0.0
        forbidden = [(row, draw.sampler.forbidden(draw.index)) for row, draw in draws]
        ids, counts = _flat_ids(forbidden, vocabulary)
        if ids.size:
            index = self._there(ids, torch.long)
            # Minus infinity is no fault: it is less than 0 here.
            hidden.index_add_(
                0,
                self._there(np.repeat([row for row, _ in forbidden], counts), torch.long),
                0 * self._read(flat, index).clamp(min=0),
            )
            flat.index_fill_(0, index, -torch.inf)
        return hidden

    def _mask(
        self, logits: torch.Tensor, draws: Sequence[tuple[int, Draw]], hidden: torch.Tensor
    ) -> dict[int, UserError]:
        """Set the logits of tokens that the grammars of the given rows exclude to minus infinity, in place.

        Makes `hidden` NaN where that hides a value of the row that is not finite. Returns the rows that no token is
        left for, and why; their logits are as they were.
        """
        vocabulary = logits.shape[1]
        refused: dict[int, UserError] = {}
        rows: list[int] = []
        bits = np.empty((len(draws), -(-vocabulary // 32)), dtype=np.uint32)
        for row, draw in draws:
            try:
                draw.sampler.fill_allowed(bits[len(rows)], draw.output)
            except UserError as error:
                refused[row] = error
            else:
                rows.append(row)
        if not rows:
            return refused
        # A table of bytes instead of `masked_fill`, which a CPU does token by token.
        (limits,) = self._kept(torch.float32, 1, len(rows), 32 * bits.shape[1])
        by_byte = self._there(bits[: len(rows)].view(np.uint8).ravel(), torch.int32)
        torch.index_select(_LIMITS.to(self._device), 0, by_byte, out=limits.view(-1, 8))
        for row, limit in zip(rows, limits[:, :vocabulary], strict=True):
            hidden[row] += 0 * self._read(logits.view(-1), slice(row * vocabulary, (row + 1) * vocabulary)).amax()
            torch.minimum(logits[row], limit, out=logits[row])
        return refused

    def _read(self, flat: torch.Tensor, place: torch.Tensor | slice) -> torch.Tensor:
        """The logits at places that are about to be overwritten."""
        if isinstance(place, slice):
            values = flat[place] if self._before is None else flat[place].clone()
        else:
            values = flat.index_select(0, place)
        if self._before is not None:
            self._before.append((place, values))
        return values

    def _unfiltered(
        self, logits: torch.Tensor, draws: Sequence[Draw], attempt: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A token of each row, drawn from the soft-max of its logits over its temperature; or `_NONE_TAKEN`.

        The second tensor is finite where the row is; `[rows]` of each.
        """
        vocabulary = logits.shape[1]
        temperature = self._temperatures(draws)
        uniforms = self._there(np.stack([draw.sampler.uniforms(draw.index, attempt) for draw in draws]), torch.float64)
        whole, groups = vocabulary // GROUP, -(-vocabulary // GROUP)
        bound, weights = self._kept(torch.float32, 2, len(draws), groups)
        (cumulated,) = self._kept(torch.float64, 1, len(draws), groups)
        # Group g holds the tokens g, g + whole, g + 2 * whole and so on: to compare rows is ten times faster than to
        # compare neighbours. The remaining tokens are the last group.
        torch.amax(torch.unflatten(logits[:, : whole * GROUP], 1, (GROUP, whole)), 1, out=bound[:, :whole])
        if whole < groups:
            torch.amax(logits[:, whole * GROUP :], 1, keepdim=True, out=bound[:, whole:])
        greatest = bound.amax(-1, keepdim=True)
        torch.sub(bound, greatest, out=weights).div_(temperature.float()).exp_()
        torch.cumsum(weights, -1, dtype=torch.float64, out=cumulated)
        target = uniforms[:, 0] * cumulated[:, -1:]
        group = _first_above(cumulated, target)
        before = torch.where(group > 0, cumulated.gather(1, (group - 1).clamp_(min=0)), 0.0)
        # What is left of the number within its group is uniform there.
        member = (GROUP * (target - before) / weights.gather(1, group)).long().clamp_(0, GROUP - 1)
        ids = torch.where(group < whole, whole * member + group, whole * GROUP + member)
        exists = ids < vocabulary
        ids.clamp_(max=vocabulary - 1)
        below = (logits.gather(1, ids) - bound.gather(1, group)).double()
        taken = exists & (uniforms[:, 1] < below.div_(temperature).exp_())
        first = (taken * torch.arange(PROPOSALS, 0, -1, device=self._device)).argmax(-1, keepdim=True)
        tokens = torch.where(taken.any(-1), ids.gather(1, first)[:, 0], _NONE_TAKEN)
        return tokens, greatest[:, 0]

    def _filtered(self, logits: torch.Tensor, draws: Sequence[Draw]) -> tuple[torch.Tensor, torch.Tensor]:
        """A token of each row, drawn from those that top-k, top-p and min-p leave.

        The second tensor is finite where the row is; `[rows]` of each.
        """
        temperature = self._temperatures(draws)
        block_max = _by_block(logits, torch.amax)
        greatest = block_max.amax(-1, keepdim=True)
        samplings = [draw.sampler.sampling for draw in draws]
        ids, scores, least = self._candidates(logits, block_max, temperature, samplings)
        weights = (scores - greatest).double().div_(temperature).exp_().masked_fill_(scores < least, 0.0)
        cumulated = weights.cumsum(-1)
        uniform = self._there([draw.sampler.uniforms(draw.index)[0, 0] for draw in draws], torch.float64)[:, None]
        tokens = ids.gather(1, _first_above(cumulated, uniform * cumulated[:, -1:]))
        return tokens[:, 0], greatest[:, 0]

    def _candidates(
        self, logits: torch.Tensor, block_max: torch.Tensor, temperature: torch.Tensor, samplings: Sequence[Sampling]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids in rising order and their logits, `[rows, n]` of each, and the least logit to keep, `[rows, 1]`.

        All that is kept is among them.
        """
        least, (values, ids) = self._least_kept(logits, block_max, temperature, samplings)
        if self._on_cpu and bool((values[:, -1:] < least).all()):
            # The largest logits have all that is kept, ties included.
            ids, order = ids.sort()
            return ids, values.gather(1, order), least
        # All that is kept lies in blocks whose maximum is kept. How many those are is only asked where that is free.
        count = block_max.shape[1]
        if self._on_cpu:
            count = max(1, int((block_max >= least).sum(-1).max()))
        blocks = block_max.topk(count, sorted=False).indices.sort().values
        ids, scores = _gathered(logits, blocks)
        return ids, scores, least

    def _least_kept(
        self, logits: torch.Tensor, block_max: torch.Tensor, temperature: torch.Tensor, samplings: Sequence[Sampling]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """`[rows, 1]`: the least logit that top-k, top-p and min-p keep, each after the one before it.

        And the largest logits of each row with their token ids, `[rows, n]` of each, as many as were looked at.
        """
        vocabulary = logits.shape[1]
        top_k = [min(one.top_k, vocabulary) or vocabulary for one in samplings]
        nucleus = any(one.top_p < 1 and one.top_k == 0 for one in samplings)
        k = self._there(top_k, torch.long)[:, None]
        p = self._there([one.top_p for one in samplings], torch.float64)[:, None]
        min_p = self._there([one.min_p for one in samplings], torch.float32)[:, None]
        limited = [one.top_k for one in samplings if one.top_k]
        unlimited = (k == vocabulary) & (p >= 1)
        # Without top-k the probabilities of a row are shares of the mass of the whole vocabulary.
        whole = torch.ones((len(logits), 1), dtype=torch.float64, device=self._device)
        if nucleus:
            log_mass = _by_block(logits / temperature.float(), torch.logsumexp).double()
            whole = log_mass.sub_(block_max.amax(-1, keepdim=True) / temperature).exp_().sum(-1, keepdim=True)
        # One more than top-k keeps, to see a tie.
        width = min(vocabulary, max(limited) + 1 if limited else _FEW_CANDIDATES)
        if nucleus and not self._on_cpu:
            width = vocabulary
        while True:
            values, ids = _greatest(logits, block_max, width)
            weights = (values - values[:, :1]).double().div_(temperature).exp_()
            cumulated = weights.cumsum(-1)
            total = torch.where(k < vocabulary, cumulated.gather(1, k.clamp(max=width) - 1), whole)
            place = torch.arange(width, device=self._device)
            kept = ((cumulated - weights) / total < p) & (place < k)
            count = kept.sum(-1, keepdim=True)
            if width == vocabulary or not self._on_cpu or not nucleus:
                break
            if bool(((count < width) | (k <= width) | unlimited).all()):
                break
            width = min(vocabulary, 16 * width)
        least = values.gather(1, (count - 1).clamp_(min=0))
        least = torch.where(unlimited, -torch.inf, least)
        return torch.maximum(least, values[:, :1] + temperature * min_p.log()), (values, ids)

    def _kept(self, dtype: torch.dtype, count: int, rows: int, columns: int) -> torch.Tensor:
        """`[count, rows, columns]` in memory that the next call uses too: new memory costs a CPU as much as its use."""
        size = count * rows * columns
        memory = self._memory.get(dtype)
        if memory is None or len(memory) < size:
            memory = self._memory[dtype] = torch.empty(size, dtype=dtype, device=self._device)
        return memory[:size].view(count, rows, columns)

    def _temperatures(self, draws: Sequence[Draw]) -> torch.Tensor:
        return self._there([draw.sampler.sampling.temperature for draw in draws], torch.float64)[:, None]

    def _there(self, values: Sequence[float] | NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
        """`values` on the device. From pinned memory, so that the host does not wait for what the device computes."""
        here = torch.as_tensor(values, dtype=dtype)
        return here if self._on_cpu else here.pin_memory().to(self._device, non_blocking=True)


def largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first token of the largest logit of each row, and that logit; `[rows]` of each. NaN is the largest."""
    if logits.shape[1] <= 4 * BLOCK:
        greatest, tokens = logits.max(-1)
        return tokens, greatest
    # In two levels: a maximum with its index is ten times slower than one without, on a CPU.
    block_max = _by_block(logits, torch.amax)
    block = block_max.argmax(-1, keepdim=True)
    ids, scores = _gathered(logits, block)
    within = scores.argmax(-1, keepdim=True)
    return ids.gather(1, within)[:, 0], block_max.gather(1, block)[:, 0]


def _grouped(draws: Sequence[Draw | None]) -> _Groups:
    groups = _Groups()
    for row, draw in enumerate(draws):
        if draw is None:
            continue
        if draw.sampler.constrains(draw.index):
            groups.constrained.append(row)
        if draw.sampler.filtered:
            groups.filtered.append(row)
        elif not draw.sampler.greedy:
            groups.unfiltered.append(row)
    return groups


def _known(tokens: torch.Tensor, witness: torch.Tensor) -> list[int | None]:
    """The tokens whose `witness` is finite. The host waits for the device here only: tokens and flags in one copy."""
    known = torch.where(witness.isfinite(), tokens, _NOT_FINITE).tolist()
    return [None if token == _NOT_FINITE else token for token in known]


def _by_block(values: torch.Tensor, reduce: Callable[..., torch.Tensor]) -> torch.Tensor:
    """`[rows, vocabulary]` reduced to `[rows, blocks]`; the last block may be shorter."""
    vocabulary = values.shape[1]
    whole = vocabulary - vocabulary % BLOCK
    parts = []
    if whole:
        parts.append(reduce(torch.unflatten(values[:, :whole], 1, (-1, BLOCK)), -1))
    if whole < vocabulary:
        parts.append(reduce(values[:, whole:], -1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _gathered(logits: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The token ids of the given blocks `[rows, n]` of each row, and their logits; `[rows, n * BLOCK]` of each.

    Beyond the end of the vocabulary the logits are minus infinity.
    """
    vocabulary = logits.shape[1]
    ids = (blocks[..., None] * BLOCK + torch.arange(BLOCK, device=logits.device)).flatten(1)
    if vocabulary % BLOCK == 0:
        return ids, logits.gather(1, ids)
    return ids, logits.gather(1, ids.clamp(max=vocabulary - 1)).masked_fill_(ids >= vocabulary, -torch.inf)


def greatest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logits of each row, in falling order, and their token ids; `[rows, count]` of each."""
    return _greatest(logits, _by_block(logits, torch.amax), count)


def _greatest(logits: torch.Tensor, block_max: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, where `block_max` `[rows, blocks]` is known."""
    if 4 * count > block_max.shape[1]:
        values, ids = logits.topk(count)
        return values, ids
    # They lie in the `count` blocks with the largest maxima.
    ids, scores = _gathered(logits, block_max.topk(count, sorted=False).indices)
    found = scores.topk(count)
    return found.values, ids.gather(1, found.indices)


def _first_above(cumulated: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`[rows, m]`: where `cumulated` `[rows, n]` first exceeds `target` `[rows, m]`.

    At the latest where it first reaches its last value: what follows there has no mass.
    """
    above = torch.searchsorted(cumulated, target, right=True)
    end = torch.searchsorted(cumulated, cumulated[:, -1:].contiguous())
    # Of a row that is not finite any place will do, within its length.
    return torch.minimum(above, end).clamp_(max=cumulated.shape[1] - 1)


def _flat_ids(rows: Sequence[tuple[int, Ids]], vocabulary: int) -> tuple[Ids, list[int]]:
    """Places of token ids in the flattened logits, and how many each row has. Ids beyond the logits are left out."""
    if not rows:
        return np.empty(0, dtype=np.int64), []
    kept = [ids for _, ids in rows]
    ids = np.concatenate(kept)
    if ids.size and int(ids.max()) >= vocabulary:
        kept = [ids[ids < vocabulary] for ids in kept]
        ids = np.concatenate(kept)
    counts = [len(ids) for ids in kept]
    return ids + np.repeat([vocabulary * row for row, _ in rows], counts), counts
