"""Reads a line of an OpenAI batch file as a `Request`.

The format is that of OpenAI's Batch API: `{"custom_id": ..., "method": "POST", "url": ..., "body": {...}}`. The body is
that of `/v1/chat/completions` or `/v1/completions`. Sampling parameters that vLLM adds to these bodies are read too.
`docs/requests.md` has the table of fields. The limits of all values are those of `Request`.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from core.errors import UserError, one_line
from core.records import MAX_NEW_TOKENS, Identifier, Request, check_size

_IDENTIFIER: TypeAdapter[str] = TypeAdapter(Identifier)
_MARK = b'"custom_id"'
_LINE = ("custom_id", "method", "url", "body")
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
COMPLETION_TOKENS = 16
"""OpenAI's default of `max_tokens` for completions."""

_SAME = (
    "model",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "n",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "response_format",
    "prompt_logprobs",
    "cache_salt",
)
"""Fields of a body that have the same name in a `Request`."""
_NEUTRAL: Mapping[str, Any] = {
    "stream": False,
    "store": False,
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "functions": [],
    "function_call": "none",
    "modalities": ["text"],
    "service_tier": "auto",
    "reasoning_effort": "none",
    "echo": False,
    "best_of": 1,
    "suffix": "",
    "audio": None,
    "prediction": None,
    "stream_options": None,
    "verbosity": "medium",
    "web_search_options": None,
    "length_penalty": 1,
    "use_beam_search": False,
}
"""Fields of a body that are not supported, with the only value that is accepted, since it changes nothing."""


def may_be_batch_line(raw: bytes) -> bool:
    """True for every batch line, and for an ordinary request only if one of its values is the text `custom_id`."""
    # The text inside a longer string would have its quotes escaped.
    return _MARK in raw


def read_request(raw: bytes, now_ms: float) -> Request:
    """Parse a record of the requests topic: a `Request`, or a line of an OpenAI batch file.

    A batch line does not say when it was created: `now_ms` (Unix time) stands in for that. Raises `UserError` with a
    line that names each field at fault.
    """
    if may_be_batch_line(raw):
        check_size(raw)
        try:
            line = from_json(raw, allow_inf_nan=False)
        except ValueError as error:
            raise UserError(f"record: Invalid JSON: {error}") from None
        if isinstance(line, dict) and "custom_id" in line:
            return _request(line, now_ms)
    return Request.from_json(raw)


def _request(line: dict[str, Any], now_ms: float) -> Request:
    for name in line:
        if name not in _LINE:
            raise UserError(f"{_shown(name)}: unknown field of a batch line; remove it")
    if line.get("method") != "POST":
        raise UserError('method: is not "POST"; every line of a batch is a POST')
    if line.get("url") not in (CHAT, COMPLETIONS):
        raise UserError(f"url: only {CHAT} and {COMPLETIONS} are served; send it there")
    if not isinstance(line.get("body"), dict):
        raise UserError("body: is not an object; put the parameters of the request there")
    body = _Body(line["body"])
    body.put("request_id", "custom_id", _identifier("custom_id", line["custom_id"]))
    (_read_chat if line["url"] == CHAT else _read_completion)(body)
    for name in _SAME:
        body.move(name, name)
    if body.fields.get("top_k") == -1:
        # vLLM's value for all tokens.
        body.fields["top_k"] = 0
    body.move("min_tokens", "min_new_tokens")
    _read_origin(body, line["custom_id"], now_ms)
    body.refuse_rest()
    try:
        return Request.model_validate_json(to_json(body.fields))
    except ValidationError as error:
        raise UserError(body.in_its_names(error)) from None


class _Body:
    """The body of a line while it is read: what is left of it, and the fields of the request that it becomes."""

    def __init__(self, body: dict[str, Any]) -> None:
        self._rest = {name: value for name, value in body.items() if value is not None}
        self.fields: dict[str, Any] = {}
        self._names: dict[str, str] = {}
        """Where the value of each field of the request stands in the line."""

    def take(self, name: str) -> Any:
        """The value of a field of the body, which counts as read; none if it is not given."""
        return self._rest.pop(name, None)

    def put(self, field: str, name: str, value: Any) -> None:
        self.fields[field] = value
        self._names[field] = name

    def move(self, name: str, field: str) -> None:
        """Give `field` of the request the value of `name`, if the body has it."""
        if (value := self.take(name)) is not None:
            self.put(field, f"body.{name}", value)

    def refuse_rest(self) -> None:
        """Raise `UserError` for the first field that was not read."""
        for name, value in self._rest.items():
            if name not in _NEUTRAL:
                raise UserError(f"body.{_shown(name)}: unknown field; remove it")
            if value != _NEUTRAL[name]:
                raise UserError(f"body.{name}: is not supported; remove it")

    def in_its_names(self, error: ValidationError) -> str:
        """The faults of the request in one line, by the names that their fields have in the batch line."""
        message = one_line(error, self._names)
        for field in ("min_new_tokens", "max_new_tokens"):
            message = message.replace(field, self._names.get(field, field))
        return message


def _read_chat(body: _Body) -> None:
    body.move("messages", "messages")
    if "messages" not in body.fields:
        raise UserError("body.messages: missing; add it")
    # Without a limit the answer ends where the model, or the context, does.
    body.put("max_new_tokens", "body.max_completion_tokens", MAX_NEW_TOKENS)
    body.move("max_tokens", "max_new_tokens")
    body.move("max_completion_tokens", "max_new_tokens")
    wanted, alternatives = body.take("logprobs"), body.take("top_logprobs")
    if wanted is not None and not isinstance(wanted, bool):
        raise UserError("body.logprobs: is not a boolean; give the number of alternatives as top_logprobs")
    if wanted:
        body.put("logprobs", "body.top_logprobs", 0 if alternatives is None else alternatives)
    elif alternatives is not None:
        raise UserError("body.top_logprobs: needs logprobs; set it to true")


def _read_completion(body: _Body) -> None:
    prompt = body.take("prompt")
    if prompt is None:
        raise UserError("body.prompt: missing; add it")
    if isinstance(prompt, list) and any(isinstance(one, str | list) for one in prompt):
        if len(prompt) > 1:
            raise UserError(f"body.prompt: holds {len(prompt)} prompts; send a line for each")
        (prompt,) = prompt
    body.put("prompt_token_ids" if isinstance(prompt, list) else "prompt", "body.prompt", prompt)
    body.put("max_new_tokens", "body.max_tokens", COMPLETION_TOKENS)
    body.move("max_tokens", "max_new_tokens")
    body.move("logprobs", "logprobs")


def _read_origin(body: _Body, custom_id: str, now_ms: float) -> None:
    """Read session, user and time of creation, none of which a batch line needs to have."""
    metadata = body.take("metadata")
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict):
        raise UserError("body.metadata: is not an object; give labels and their texts")
    session_id = _first_given(
        ("body.metadata.session_id", metadata.get("session_id")),
        ("body.prompt_cache_key", body.take("prompt_cache_key")),
        ("custom_id", custom_id),
    )
    user_id = _first_given(
        ("body.user", body.take("user")),
        ("body.safety_identifier", body.take("safety_identifier")),
        ("session_id", session_id),
    )
    body.put("session_id", "session_id", session_id)
    body.put("user_id", "user_id", user_id)
    created = metadata.get("created_at_ms")
    try:
        # Values of OpenAI's metadata are strings.
        created_at_ms = now_ms if created is None else float(created)
    except (TypeError, ValueError, OverflowError):
        raise UserError("body.metadata.created_at_ms: is not a number; give a Unix time in milliseconds") from None
    body.put("created_at_ms", "body.metadata.created_at_ms", created_at_ms)


def _first_given(*candidates: tuple[str, Any]) -> str:
    """The first identifier that is given, by name and value."""
    return next(_identifier(name, value) for name, value in candidates if value is not None)


def _identifier(name: str, value: Any) -> str:
    try:
        return _IDENTIFIER.validate_python(value, strict=True)
    except ValidationError as error:
        raise UserError(one_line(error).replace("record", name, 1)) from None


def _shown(name: str) -> str:
    """A name of the user's in one line of bounded length."""
    return " ".join(name.split())[:100]
