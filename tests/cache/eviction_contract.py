"""The contract of every eviction policy, tested with calls in any order."""

from unittest import TestCase

import torch
from cache_support import LIMITS, SHAPE, stamp
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cache.eviction import EvictionPolicy, make_eviction
from cache.eviction.shadow import ShadowTier
from cache.local import LocalTier

NUMBERS = 12
prompts = st.lists(st.integers(0, NUMBERS - 1), unique=True, min_size=1, max_size=6)


def key(number: int) -> bytes:
    return number.to_bytes(4, "big") * 8


def keys(*numbers: int) -> list[bytes]:
    return [key(number) for number in numbers]


def content(number: int) -> torch.Tensor:
    return stamp([number] * SHAPE.chunk_tokens, 0)


def remembered(policy: EvictionPolicy) -> set[bytes]:
    """Every key in the policy's dictionaries, sets, lists and parts, at any depth."""
    found: set[bytes] = set()
    todo = list(vars(policy).values())
    while todo:
        value = todo.pop()
        if isinstance(value, list | tuple):
            todo += value
        elif isinstance(value, EvictionPolicy | ShadowTier):
            todo += vars(value).values()
        elif isinstance(value, dict | set):
            found |= {one for one in value if isinstance(one, bytes)}
            todo += [] if isinstance(value, set) else value.values()
    return found


class Contract(RuleBasedStateMachine):
    """A tier with one policy, called as the manager calls it, compared with a plain set of keys."""

    name: str

    @initialize(capacity=st.integers(0, 6))
    def open(self, capacity):
        self.policy = make_eviction(self.name)
        self.policy.on_resize(capacity)
        self.capacity = capacity
        self.inside: set[bytes] = set()

    def evict_to(self, chunks: int) -> None:
        while len(self.inside) > max(chunks, 0):
            victim = next(self.policy.victims())
            self.policy.on_remove(victim)
            self.inside.remove(victim)

    def insert(self, number: int) -> bool:
        if key(number) in self.inside or self.capacity == 0:
            return key(number) in self.inside
        if len(self.inside) >= self.capacity:
            if not self.policy.admits(key(number)):
                return False
            self.evict_to(self.capacity - 1)
        self.policy.on_insert(key(number))
        self.inside.add(key(number))
        return True

    @rule(prompt=prompts)
    def a_prompt_is_looked_up_and_stored(self, prompt):
        self.policy.on_request(keys(*prompt))
        for number in prompt:
            self.insert(number)
        self.policy.arrange([key(number) for number in prompt if key(number) in self.inside])

    @rule(prompt=prompts)
    def a_prompt_is_looked_up_and_its_store_fails(self, prompt):
        self.policy.on_request(keys(*prompt))

    @rule(prompt=prompts, other=prompts)
    def two_prompts_are_in_flight_at_once(self, prompt, other):
        self.policy.on_request(keys(*prompt))
        self.policy.on_request(keys(*other))
        for one in (other, prompt):
            for number in one:
                self.insert(number)
            self.policy.arrange([key(number) for number in one if key(number) in self.inside])

    @rule(number=st.integers(0, NUMBERS - 1))
    def a_chunk_comes_that_nobody_asked_for(self, number):
        self.insert(number)

    @rule(number=st.integers(0, NUMBERS - 1))
    def one_block_is_accessed(self, number):
        self.policy.on_request(keys(number))
        self.insert(number)

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def another_than_the_first_leaves(self, data):
        """Evict as if a prefix pinned the first key."""
        victim = data.draw(st.sampled_from(sorted(self.inside)))
        self.policy.on_remove(victim)
        self.inside.remove(victim)

    @rule(capacity=st.integers(0, 6))
    def resize(self, capacity):
        self.capacity = capacity
        self.policy.on_resize(capacity)
        self.evict_to(capacity)

    @invariant()
    def victims_are_exactly_the_keys_that_are_in(self):
        victims = list(self.policy.victims())
        assert sorted(victims) == sorted(self.inside)
        assert list(self.policy.victims()) == victims, "asking for victims changed their order"

    @invariant()
    def what_is_remembered_is_bounded(self):
        assert len(remembered(self.policy) - self.inside) <= self.policy.ghosts_per_chunk * self.capacity


def check_order_in_a_prompt(name: str, length: int, capacity: int, times: int) -> None:
    """Use a prompt of `length` chunks `times` times; in a tier of `capacity` chunks its first chunks must stay."""
    tier = LocalTier(length, SHAPE.size_bytes, make_eviction(name))
    prompt = keys(*range(length))
    for _ in range(times):
        tier.request(prompt)
        for number in range(length):
            if key(number) not in tier:
                assert tier.put(key(number), content(number))
        tier.arrange(prompt)
    tier.resize(capacity)
    assert set(tier) == set(prompt[:capacity])


def machine(name: str, examples: int = 60) -> type[TestCase]:
    """A test case that checks the contract for the registered policy `name`."""
    case = type(f"Contract{name}", (Contract,), {"name": name}).TestCase
    case.settings = settings(LIMITS, max_examples=examples, stateful_step_count=30)
    return case
