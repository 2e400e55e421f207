"""The records on the wire: a request, its response, and the dead letter of a record that cannot be one.

Topics carry one JSON object a record. Unknown fields are refused by name, so that a misspelt option is an error
and never a silent default.
"""

import base64
import json
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticSerializationError

from core.errors import UserError, one_line

TokenId = Annotated[int, Field(ge=0, lt=1 << 32)]
Identifier = Annotated[str, Field(min_length=1, max_length=256)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
MAX_NEW_TOKENS = 1 << 20
"""Maximum `max_new_tokens` of a request, and so no limit beside the context that a model has."""
MAX_STOPS = 64
"""Maximum number of stop strings, and of stop tokens, per request."""
MAX_CHOICES = 128
"""Maximum number of answers per request."""
MAX_BIASED_TOKENS = 1024
"""Maximum number of tokens with a bias per request."""
MAX_FORMAT_CHOICES = 1024
"""Maximum number of texts to choose from in a `response_format`."""
MAX_RECORD_BYTES = 1 << 20
"""A request record above this many bytes is a dead letter; Kafka's own default limit is about the same."""
MAX_RESULT_BYTES = 4 * MAX_RECORD_BYTES
"""Limit of what a job writes: an answer, or a dead letter of a request of twice the allowed size in base64."""
MAX_DEAD_LETTER_RAW_BYTES = 2 * MAX_RECORD_BYTES
"""Maximum bytes of the original record that a dead letter keeps."""
RECORD_OVERHEAD_BYTES = 32 << 10
"""More than an answer's fields without lists and texts, its key and Kafka's own share of its record take together."""
MAX_REASON_CHARACTERS = 4096
"""A reason may quote what the record holds, or an error of a library; it is cut here."""


def _milliseconds(time_ms: float) -> float:
    """Refuses Unix times in seconds, of 2001 to 5138: in milliseconds they are in the first years after 1970."""
    if 1e9 <= time_ms < 1e11:
        raise ValueError(f"{time_ms:.0f} is a Unix time in seconds; give milliseconds")
    return time_ms


def _default_for_null(default: Any) -> BeforeValidator:
    """`null` means that the field is not given."""
    return BeforeValidator(lambda value: default if value is None else value)


def _one_or_several(value: Any) -> Any:
    """A string is a list of one."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _text_of_parts(content: Any) -> Any:
    """Joins content parts of type `text` by line breaks."""
    if not isinstance(content, list):
        return content
    if not content:
        raise ValueError("no part in it; send some text")
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
            raise ValueError(f'part {index} is not of the form {{"type": "text", "text": ...}}; only text is served')
        if not isinstance(part["text"], str):
            raise ValueError(f"the text of part {index} is not a string")
    return "\n".join(part["text"] for part in content)


def check_size(raw: bytes) -> None:
    """Raise `UserError` for a record above `MAX_RECORD_BYTES`."""
    if len(raw) > MAX_RECORD_BYTES:
        raise UserError(f"record: {len(raw)} bytes are more than the {MAX_RECORD_BYTES} allowed; shorten it")


class FinishReason(StrEnum):
    STOP = "stop"
    """The model produced an end token or a stop token (which is not part of the answer), or a stop string."""
    LENGTH = "length"
    """`max_new_tokens` were produced."""
    CONTEXT = "context"
    """The sequence reached the longest the engine can hold."""
    DEADLINE = "deadline"
    """`deadline_ms` passed first; what was produced until then is the answer."""


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_text_of_parts)] = Field(description="a string, or parts of type text")


class JsonSchema(BaseModel):
    """A JSON schema, as OpenAI wraps it. `name`, `description` and `strict` change nothing: it is always enforced."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    definition: dict[str, Any] = Field(alias="schema", description="the JSON schema itself")
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """What the text of an answer must be. The types after `json_object` need the field of the same name."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema", "regex", "choice"]
    json_schema: JsonSchema | None = Field(default=None, description="the answer is JSON that is valid under it")
    regex: str | None = Field(
        default=None, min_length=1, max_length=1 << 16, description="matches the whole answer; syntax of Rust's regex"
    )
    choice: tuple[StopString, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_FORMAT_CHOICES,
        fail_fast=True,
        description="the answer is one of these texts",
    )

    @model_validator(mode="after")
    def _as_its_type_says(self) -> Self:
        for name in ("json_schema", "regex", "choice"):
            if (getattr(self, name) is None) == (self.type == name):
                raise ValueError(
                    f"type {self.type} {'needs' if self.type == name else 'does not have'} the field {name}"
                )
        return self


class Request(BaseModel):
    """One request for an answer of the model; exactly one of `prompt`, `messages`, `prompt_token_ids` is given."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    request_id: Identifier
    session_id: Identifier
    user_id: Identifier
    max_new_tokens: int = Field(ge=1, le=MAX_NEW_TOKENS)
    created_at_ms: Annotated[float, AfterValidator(_milliseconds)] = Field(
        ge=0, le=1e15, description="Unix time at which the client made the request"
    )
    prompt: str | None = Field(default=None, min_length=1)
    messages: tuple[Message, ...] | None = Field(default=None, min_length=1, fail_fast=True)
    prompt_token_ids: tuple[TokenId, ...] | None = Field(default=None, min_length=1, fail_fast=True)
    # Sampling: none means the job's default.
    temperature: float | None = Field(default=None, ge=0, le=100, description="0 is greedy")
    top_k: int | None = Field(default=None, ge=0, le=1 << 32, description="sample from this many tokens; 0: from all")
    top_p: float | None = Field(default=None, gt=0, le=1, description="sample from the likeliest tokens of this mass")
    min_p: float | None = Field(default=None, ge=0, le=1, description="least probability, relative to the greatest")
    repetition_penalty: float | None = Field(
        default=None, gt=0, le=100, description="penalty on tokens of prompt and answer"
    )
    presence_penalty: float | None = Field(
        default=None, ge=-2, le=2, description="penalty on each token in the answer so far"
    )
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, description="the same for each occurrence")
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        default=None, max_length=MAX_BIASED_TOKENS, description="by token id, added to its logit"
    )
    seed: int | None = Field(default=None, ge=0, lt=1 << 63, description="none: derived from request_id")
    logprobs: int | None = Field(
        default=None, ge=0, le=20, description="report log-probabilities, and those of this many likeliest tokens"
    )
    prompt_logprobs: int | None = Field(
        default=None, ge=0, le=20, description="the same for the tokens of the prompt, all of which are then computed"
    )
    n: Annotated[int, _default_for_null(1)] = Field(
        default=1, ge=1, le=MAX_CHOICES, description="number of answers, each with random numbers of its own"
    )
    # Where the answer ends.
    min_new_tokens: int | None = Field(default=None, ge=0, le=1 << 20, description="no end or stop before this many")
    stop: Annotated[tuple[StopString, ...], BeforeValidator(_one_or_several)] | None = Field(
        default=None, max_length=MAX_STOPS, description="strings that end the answer; they are not part of its text"
    )
    stop_token_ids: tuple[TokenId, ...] | None = Field(
        default=None, max_length=MAX_STOPS, description="tokens that end the answer, like the model's own end tokens"
    )
    ignore_eos: Annotated[bool, _default_for_null(False)] = Field(
        default=False, description="do not end at the model's own end tokens"
    )
    response_format: ResponseFormat | None = Field(default=None, description="format of the answer's text")
    deadline_ms: float | None = Field(default=None, gt=0, le=1e12, description="time allowed, from created_at_ms on")
    priority: Annotated[int, _default_for_null(0)] = Field(
        default=0, ge=-1000, le=1000, description="higher is served first"
    )
    cache_salt: Annotated[str, _default_for_null("")] = Field(
        default="", max_length=256, description="requests share cached chunks only within a salt"
    )
    model: str | None = Field(default=None, min_length=1, max_length=256, description="refused where another serves")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [name for name in ("prompt", "messages", "prompt_token_ids") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"give exactly one of prompt, messages, prompt_token_ids (found {found})")
        if self.min_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens is above max_new_tokens ({self.min_new_tokens} > {self.max_new_tokens})")
        if self.ignore_eos and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("ignore_eos: an answer in a response_format ends with an end token; leave one of them out")
        return self

    @classmethod
    def from_json(cls, raw: bytes | str) -> Self:
        """Parse one record. Raises `UserError` with a line that names each field at fault."""
        if isinstance(raw, str):
            raw = raw.encode(errors="surrogatepass")
        check_size(raw)
        try:
            return cls.model_validate_json(raw)
        except ValidationError as error:
            raise UserError(one_line(error)) from None

    def to_json(self) -> str:
        return self.model_dump_json(exclude_defaults=True, by_alias=True)


class Sampling(BaseModel):
    """Sampling parameters of an answer. With the defaults the most likely token is taken."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    temperature: float = Field(default=0.0, ge=0, le=100, description="0 is greedy")
    top_k: int = Field(default=0, ge=0, description="draw from this many likeliest tokens; 0: from all")
    top_p: float = Field(default=1.0, ge=0, le=1, description="draw from the likeliest tokens of this probability")
    min_p: float = Field(default=0.0, ge=0, le=1, description="least probability, as a share of the greatest")
    repetition_penalty: float = Field(default=1.0, gt=0, description="divides positive logits of tokens seen before")
    presence_penalty: float = Field(default=0.0, description="subtracted from logits of tokens of the answer so far")
    frequency_penalty: float = Field(default=0.0, description="the same, times the number of occurrences")
    logit_bias: dict[int, float] = Field(default={}, description="by token id, added to its logit")
    min_new_tokens: int = Field(default=0, ge=0, description="tokens before the answer may end")
    seed: int | None = Field(default=None, ge=0, lt=1 << 63, description="seed of the random numbers; none if greedy")
    token_rules: tuple[str, ...] = Field(
        default=(), description="lists of generation_config.json that forbid or force tokens"
    )

    @model_serializer
    def _without_defaults(self) -> dict[str, Any]:
        """Write only parameters that change something, because most answers have none."""
        return {name: value for name, value in self.__dict__.items() if value != _NEUTRAL[name]}


_NEUTRAL = {name: field.default for name, field in Sampling.model_fields.items()}


class TokenLogprob(BaseModel):
    """The log-probability of one token of an answer or a prompt, by the model's own logits."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    token_id: int
    logprob: float = Field(le=1e-3)
    top: tuple[tuple[int, float], ...] = Field(default=(), description="likeliest tokens: ids and log-probabilities")


class Choice(BaseModel):
    """One of the `n` answers to a request."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = Field(
        default=None, description="one for each of token_ids, if the request asked for them"
    )
    finish_reason: FinishReason


class Response(BaseModel):
    """The answer to one request, with every count and timing that the experiments read.

    `prompt_tokens == local_tokens + remote_tokens + computed_tokens`, exactly.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    request_id: str
    session_id: str
    user_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = Field(
        default=None, description="one for each of token_ids, if the request asked for them"
    )
    finish_reason: FinishReason
    further_choices: tuple[Choice, ...] = Field(
        default=(), description="the answers after the first one, if the request's n is above 1"
    )
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = Field(
        default=None,
        description="one for each prompt token, none for the first, if the request asked for them; fewer if the "
        "deadline passed before the whole prompt was computed",
    )
    sampling: Sampling | None = Field(
        default=None, description="sampling parameters that were used; none in records of older versions"
    )
    slot: int = Field(ge=0, description="index of the inference subtask that answered")
    device: str
    engine: str
    model: str
    batch_id: str = Field(description="one id for all requests that entered the engine as one micro-batch")
    batch_size: int = Field(
        ge=1,
        description="requests in the micro-batch; continuous: requests running when this one began, itself included",
    )
    decode_rows: float | None = Field(
        default=None, ge=1, description="mean number of sequences that decoded together in its steps; none without one"
    )

    prompt_tokens: int = Field(ge=1)
    local_tokens: int = Field(ge=0, description="prompt tokens whose key/value came from the local tier")
    remote_tokens: int = Field(ge=0, description="prompt tokens whose key/value came from Redis")
    computed_tokens: int = Field(ge=0, description="prompt tokens that were prefilled")
    output_tokens: int = Field(ge=0, description="tokens of all choices together")

    created_at_ms: float = Field(description="created_at_ms of the request")
    completed_at_ms: float = Field(description="Unix time at which the answer leaves; micro: with its whole batch")
    wait_ms: float = Field(ge=0, description="from arrival at the operator to the begin of the prefill")
    ttft_ms: float | None = Field(description="from created_at_ms to the first token; none without a token")
    tpot_ms: float | None = Field(
        description="mean time per output token after the first, of several choices over the tokens of the longest; "
        "none below two tokens"
    )
    inference_ms: float = Field(ge=0, description="from the begin of the prefill to the last token")
    e2e_ms: float = Field(description="from created_at_ms to completed_at_ms")

    cache_capacity_chunks: int = Field(ge=0, description="capacity of the local tier at this request's lookup")
    cache_used_chunks: int = Field(ge=0, description="chunks in the local tier at that time")
    chunk_bytes: int = Field(ge=0, description="size of one chunk's tensors")

    @model_validator(mode="after")
    def _tokens_add_up(self) -> Self:
        if self.prompt_tokens != self.local_tokens + self.remote_tokens + self.computed_tokens:
            raise ValueError("prompt_tokens must equal local_tokens + remote_tokens + computed_tokens")
        if self.output_tokens != len(self.token_ids) + sum(len(one.token_ids) for one in self.further_choices):
            raise ValueError("output_tokens must equal the number of token_ids of all choices")
        return self

    @property
    def is_too_long(self) -> bool:
        """True if its record is above `MAX_RESULT_BYTES`, so that the topic would refuse it."""
        # Most are short: then nothing is written to find that out.
        written_bytes = _logprob_bytes(self.prompt_logprobs)
        if self.sampling is not None:
            written_bytes += 40 * len(self.sampling.logit_bias)
        choices: tuple[Response | Choice, ...] = (self, *self.further_choices)
        for one in choices:
            written_bytes += 100 + 12 * len(one.text) + 12 * len(one.token_ids) + _logprob_bytes(one.logprobs)
        if RECORD_OVERHEAD_BYTES + written_bytes <= MAX_RESULT_BYTES:
            return False
        return RECORD_OVERHEAD_BYTES + len(self.to_json()) > MAX_RESULT_BYTES

    def to_json(self, without: AbstractSet[str] = frozenset()) -> str:
        """The record, without the fields that `without` names, and those that the request did not ask for."""
        return _ascii_json(
            self, without | {name for name, default in _ONLY_IF_ASKED.items() if getattr(self, name) == default}
        )


_ONLY_IF_ASKED: dict[str, Any] = {"logprobs": None, "prompt_logprobs": None, "further_choices": ()}


def _logprob_bytes(logprobs: Sequence[TokenLogprob | None] | None) -> int:
    """More than the JSON of `logprobs` takes."""
    return sum(80 + (0 if one is None else 40 * len(one.top)) for one in logprobs or ())


class DeadLetter(BaseModel):
    """A record that could not be answered: its bytes as they came, where they came from, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reason: str
    stage: Literal["decode", "inference"]
    request_id: str | None = None
    topic: str
    partition: int
    offset: int
    raw_bytes: int | None = Field(description="length of the record's value; none for a record without one")
    raw_base64: str | None = Field(description="the value's bytes, cut after MAX_DEAD_LETTER_RAW_BYTES")

    @classmethod
    def of(cls, raw: bytes | None, reason: str, **fields: Any) -> Self:
        """A letter within `MAX_RESULT_BYTES`, whatever the record holds."""
        reason = reason[:MAX_REASON_CHARACTERS]
        if raw is None:
            return cls(raw_bytes=None, raw_base64=None, reason=reason, **fields)
        kept = base64.b64encode(raw[:MAX_DEAD_LETTER_RAW_BYTES]).decode()
        return cls(raw_bytes=len(raw), raw_base64=kept, reason=reason, **fields)

    @property
    def raw(self) -> bytes | None:
        return None if self.raw_base64 is None else base64.b64decode(self.raw_base64)

    def to_json(self) -> str:
        return _ascii_json(self)


def _ascii_json(record: BaseModel, without: AbstractSet[str] = frozenset()) -> str:
    """ASCII only: a lone surrogate of a half-finished character must not break the writer's UTF-8."""
    left_out = set(without)
    try:
        return record.model_dump_json(exclude=left_out, ensure_ascii=True)
    except PydanticSerializationError:  # pydantic's own writer is ten times as fast, and takes no lone surrogate
        fields = record.model_dump(mode="json", exclude=left_out)
        return json.dumps(fields, ensure_ascii=True, separators=(",", ":"))
