"""Turns a prompt or messages into token ids, with one model's tokenizer and chat template."""

from collections.abc import Sequence
from typing import Any

from core.errors import UserError
from core.records import Message
from inference_service.chat_template import ChatTemplate
from inference_service.plain_text import PlainText


class PromptEncoder:
    """Encodes requests. Special tokens that a request spells become text, unless they are allowed."""

    def __init__(self, tokenizer: Any, model_name: str, allow_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._name = model_name
        self._plain_text = None if allow_special_tokens else PlainText(tokenizer)
        self._template = ChatTemplate(tokenizer, model_name, self._plain_text) if tokenizer.chat_template else None

    @property
    def content_form(self) -> str:
        """The form in which the chat template gets the text of a message."""
        if self._template is None:
            return "nothing: there is no chat template"
        return "a list of parts" if self._template.takes_parts else "strings"

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids, including those that the tokenizer begins and ends a text with. Raises `UserError`."""
        self._check_separable("prompt", text)
        return self._encode(text, add_special_tokens=True)

    def encode_messages(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the messages as the chat template renders them. Raises `UserError` as `ChatTemplate.render`."""
        if self._template is None:
            raise UserError(f"messages: the tokenizer of {self._name!r} has no chat template; send prompt instead")
        for index, message in enumerate(messages):
            self._check_separable(f"messages.{index}", message.content)
        # The template writes the special tokens itself; adding them again would double them.
        return self._encode(self._template.render(messages), add_special_tokens=False)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if self._plain_text is not None:
            return self._plain_text.encode(text, add_special_tokens=add_special_tokens)
        ids: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def _check_separable(self, field: str, text: str) -> None:
        token = None if self._plain_text is None else self._plain_text.inseparable(text)
        if token is not None:
            raise UserError(
                f"{field}: the tokenizer of {self._name!r} cannot read {token!r} as text; leave it out, or start the "
                "job with --allow-special-tokens"
            )
