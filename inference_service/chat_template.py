"""Render messages by a model's chat template, and make sure that nothing of them is lost.

A template is a program. It can drop a system message, reorder turns, or cut and change their texts, and report none of
it. To detect this, messages are rendered a second time with marks around each text. The marks also tell the template's
own special tokens from those that a message spells.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from core.errors import UserError
from core.records import Message
from inference_service.plain_text import PlainText

PRIVATE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
"""Code points without a meaning. Marks are characters from here that occur in no message."""
REASONING = ("<think>", "</think>")
"""Begin and end of an answer's reasoning. Templates drop the reasoning of earlier answers."""


class ChatTemplate:
    """The chat template of one tokenizer. A test message shows if it takes texts as strings or as lists of parts."""

    def __init__(self, tokenizer: Any, model_name: str, plain_text: PlainText | None) -> None:
        """`plain_text`: encodes special tokens that messages spell as text; None leaves them special tokens."""
        self._tokenizer = tokenizer
        self._name = model_name
        self._controls = re.compile(r"(?!)") if plain_text is None else plain_text.control_tokens
        self._plain_text = plain_text
        self.takes_parts = not self._shows_text(parts=False) and self._shows_text(parts=True)

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt, to be encoded by `plain_text` if that was given.

        Raises `UserError` if the template refuses the messages, or drops, changes or reorders a text. It may drop white
        space around texts and the reasoning of earlier answers, and may put the system message anywhere.
        """
        plain = self._rendered(messages, [message.content for message in messages], self.takes_parts)
        marked = _Marked.of(messages, self._controls)
        try:
            found = self._rendered(messages, marked.contents, self.takes_parts)
        except UserError:
            if marked.spells_controls:
                raise
            found = ""
        if marked.spells_controls or marked.without_marks(found) == plain:
            self._check_shown(messages, marked, found)
        else:
            # The template's output depends on how a text begins, or on its length, so the marks changed it.
            self._check_in_order(messages, plain)
            stretched = _Marked.instead_of(messages)
            self._check_shown(messages, stretched, self._rendered(messages, stretched.contents, self.takes_parts))
            found = plain
        if self._plain_text is None:
            return marked.without_marks(found)
        return marked.respelled(found, self._plain_text)

    def _rendered(self, messages: Sequence[Message], contents: Sequence[str], parts: bool) -> str:
        chat = [
            {"role": message.role, "content": [{"type": "text", "text": content}] if parts else content}
            for message, content in zip(messages, contents, strict=True)
        ]
        try:
            text = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        # Many templates raise for roles or an order of turns that they do not know. A few have faults.
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"messages: the chat template of {self._name!r} does not take them: {reason}") from error
        return str(text)

    def _shows_text(self, parts: bool) -> bool:
        messages = [Message(role="user", content="Hello")]
        marked = _Marked.of(messages, self._controls)
        try:
            self._check_shown(messages, marked, self._rendered(messages, marked.contents, parts))
        except UserError:
            return False
        return True

    def _check_shown(self, messages: Sequence[Message], marked: "_Marked", found: str) -> None:
        last = 0
        for index, (message, mark, shown) in enumerate(zip(messages, marked.marks, marked.shown, strict=True)):
            if not shown:
                continue
            begin = found.find(mark)
            if begin < 0:
                raise self._refusal(index, message, "leaves out its text")
            if not found.startswith(shown, begin):
                raise self._refusal(index, message, "changes its text")
            if message.role != "system":
                if begin < last:
                    raise self._refusal(index, message, "puts it before an earlier message")
                last = begin

    def _check_in_order(self, messages: Sequence[Message], prompt: str) -> None:
        last = 0
        for index, message in enumerate(messages):
            text = _parts_of(message)[1]
            begin = prompt.find(text, 0 if message.role == "system" else last)
            if begin < 0:
                raise self._refusal(index, message, "leaves out its text, changes it, or puts it elsewhere")
            if message.role != "system":
                last = begin + len(text)

    def _refusal(self, index: int, message: Message, what: str) -> UserError:
        return UserError(
            f"messages.{index}: the chat template of {self._name!r} {what} (role {message.role}); leave this message "
            "out, or send prompt instead"
        )


@dataclass(frozen=True)
class _Marked:
    """Messages with marks: each text stands between two copies of its own character, each special token in quotes."""

    contents: list[str]
    shown: list[str]
    """For each message, the text that must be in the prompt, with its marks; empty if the message has no text."""
    marks: list[str]
    open: str
    close: str
    controls: re.Pattern[str]
    spells_controls: bool

    @classmethod
    def of(cls, messages: Sequence[Message], controls: re.Pattern[str]) -> "_Marked":
        """`controls` matches special tokens. They are quoted where a message spells them."""
        open_, close, *marks = _unused_characters(messages, 2 + len(messages))
        spelled = False

        def quote(found: re.Match[str]) -> str:
            nonlocal spelled
            spelled = True
            return f"{open_}{found[0]}{close}"

        def quote_in_answer(found: re.Match[str]) -> str:
            return found[0] if found[0] in REASONING else quote(found)

        contents, shown = [], []
        for message, mark in zip(messages, marks, strict=True):
            quoting = quote_in_answer if message.role == "assistant" else quote
            before, text, after = (controls.sub(quoting, part) for part in _parts_of(message))
            shown.append(f"{mark}{text}{mark}" if text else "")
            contents.append(before + shown[-1] + after)
        return cls(contents, shown, marks, open_, close, controls, spelled)

    @classmethod
    def instead_of(cls, messages: Sequence[Message]) -> "_Marked":
        """Messages of the same lengths that consist of their marks only."""
        open_, close, *marks = _unused_characters(messages, 2 + len(messages))
        parts = [_parts_of(message) for message in messages]
        shown = [len(text) * mark for (_, text, _), mark in zip(parts, marks, strict=True)]
        contents = [before + text + after for (before, _, after), text in zip(parts, shown, strict=True)]
        return cls(contents, shown, marks, open_, close, re.compile(r"(?!)"), False)

    def without_marks(self, text: str) -> str:
        return text.translate(dict.fromkeys(map(ord, (self.open, self.close, *self.marks))))

    def respelled(self, text: str, plain_text: PlainText) -> str:
        """`text` without marks. The template's own special tokens get the spellings of `plain_text`."""

        def respell(found: re.Match[str]) -> str:
            # A template may have removed one of the two quotes. Without both the token is the template's own.
            begins, ends = found.span()
            spelled = (begins > 0 and text[begins - 1] == self.open) or text.startswith(self.close, ends)
            return found[0] if spelled else plain_text.as_control(found[0])

        return self.without_marks(self.controls.sub(respell, text))


def _unused_characters(messages: Sequence[Message], count: int) -> list[str]:
    """Private-use characters that occur in no message. Raises `UserError` if there are too few."""
    used = set().union(*(message.content for message in messages))
    found = (character for code in itertools.chain(*PRIVATE) if (character := chr(code)) not in used)
    unused = list(itertools.islice(found, count))
    if len(unused) < count:
        raise UserError("messages: they hold nearly every private-use character of Unicode; leave those out")
    return unused


def _parts_of(message: Message) -> tuple[str, str, str]:
    """Three parts of a message: its text, and before and after it what a template may drop."""
    content = message.content
    text = content.rpartition(REASONING[1])[2] if message.role == "assistant" else content
    text = text.lstrip()
    before = content[: len(content) - len(text)]
    stripped = text.rstrip()
    return before, stripped, text[len(stripped) :]
