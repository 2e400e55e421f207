from random import Random

from hypothesis import given
from hypothesis import strategies as st

from workloads.conversation import Conversation, longest_turn_tokens, made_text, system_text

seeds = st.integers(min_value=0, max_value=2**63 - 1)


@given(seed=seeds, length=st.integers(min_value=0, max_value=500))
def test_made_text_has_the_asked_length_in_ascii_and_no_line_break(seed: int, length: int) -> None:
    text = made_text(Random(seed), length)
    assert len(text.encode("ascii")) == length
    assert "\n" not in text


@given(seed=seeds, length=st.integers(min_value=0, max_value=500))
def test_system_text_is_one_line_of_the_asked_length(seed: int, length: int) -> None:
    text = system_text(seed, length)
    assert len(text) == length
    assert text == "" or (text.endswith("\n") and text.count("\n") == 1)


@given(
    seed=seeds,
    system=st.sampled_from(["", "Be brief.\n"]),
    turn_tokens=st.integers(min_value=2, max_value=80),
    reply_tokens=st.integers(min_value=1, max_value=80),
    turns=st.integers(min_value=1, max_value=12),
)
def test_each_prompt_extends_the_one_before_by_a_reply_and_a_turn(
    seed: int, system: str, turn_tokens: int, reply_tokens: int, turns: int
) -> None:
    conversation = Conversation(seed, "user-01/s1", system, turn_tokens, reply_tokens)
    before = ""
    for number in range(turns):
        foreseen = conversation.next_prompt_tokens
        prompt = conversation.next_prompt()
        assert len(prompt.encode()) == foreseen
        added = prompt.removeprefix(before).encode()
        assert before.encode() + added == prompt.encode()
        if number == 0:
            assert added.startswith(system.encode() + b"User: ")
        else:
            assert added[reply_tokens:].startswith(b"\nUser: ")
            assert b"\n" not in added[:reply_tokens]
        assert added.endswith(b"\nAssistant:")
        assert len(added) <= max(len(system), reply_tokens + 1) + longest_turn_tokens(turn_tokens)
        before = prompt


def test_a_session_says_the_same_whoever_else_talks_and_differs_by_seed_and_session() -> None:
    def second_prompt(seed: int, session: str) -> str:
        conversation = Conversation(seed, session, "", 60, 20)
        conversation.next_prompt()
        return conversation.next_prompt()

    assert second_prompt(1, "user-01/s1") == second_prompt(1, "user-01/s1")
    assert second_prompt(1, "user-01/s1") != second_prompt(2, "user-01/s1")
    assert second_prompt(1, "user-01/s1") != second_prompt(1, "user-01/s2")
