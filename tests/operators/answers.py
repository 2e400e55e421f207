"""Answers of a slot, parsed as readers of the topics parse them."""

from collections.abc import Iterable

from core.records import DeadLetter, Response
from operators.envelope import Answer, WrittenResponse


def response_of(answer: Answer) -> Response:
    """The response in the answer's record. A dead letter fails the test."""
    assert isinstance(answer.record, WrittenResponse), answer
    return Response.model_validate_json(answer.record.to_json())


def responses_of(answers: Iterable[Answer]) -> list[Response]:
    return [response_of(answer) for answer in answers]


def letter_of(answer: Answer) -> DeadLetter:
    """The answer's dead letter. A response fails the test."""
    assert isinstance(answer.record, DeadLetter), answer
    return answer.record
