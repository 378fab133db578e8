"""Conversations as data have them: a question is a text, or messages with what a chat template reads beside them.

`messages_of` checks a list of messages and brings it into one form. A message has a role, a content, and whatever else
the template reads of it: ``tool_calls``, ``name``, ``tool_call_id``, ``reasoning_content``.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Message = Mapping[str, Any]
MARK = "\ufdd0"  # no character by Unicode: `jaxpo.text.templates` puts it before control tokens that are only text
NO_TEXT = re.compile(f"[\ud800-\udfff{MARK}]")
OTHER_ROLES = {"human": "user", "gpt": "assistant"}  # names that ShareGPT gives to roles
NAMES = {"name", "tool_call_id", "id"}  # fields that say nothing by themselves


@dataclass(frozen=True)
class Conversation:
    """Messages, and what the chat template is given beside them.

    messages: the messages, as `messages_of` returns them.
    arguments: arguments of the template by name: ``tools``, ``documents``, or the template's own.
    """

    messages: tuple[Message, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)


Question = str | Sequence[Message] | Conversation
Said = str | Message  # an answer: its text, or the assistant's message


class Turn(NamedTuple):
    """A question and its answer as tokens.

    Attributes:
      prompt: token ids of what asks.
      answer: token ids of the answer, with the one that ends it.
      text: what the answer's tokens spell, without the end.
    """

    prompt: list[int]
    answer: list[int]
    text: str


def messages_of(value: Any) -> list[dict[str, Any]]:
    """Check a list of messages, or one message, and return the list in one form.

    Null fields are left out. Content that is null beside another field is "", as the assistant has it that calls a
    tool. Content parts of type text are joined. Arguments of tool calls are objects, or objects as JSON. Messages
    ``{"from": "human", "value": ...}`` become ``{"role": "user", "content": ...}``.

    Raises:
      ValueError: no messages, or one that is none; the line says which one, and what was found.
    """
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ValueError(f"must be a text or a list of messages, found {value!r:.60}")
    if not value:
        raise ValueError("is a list without messages")
    return [_message(m, f"message {i}") for i, m in enumerate(value, start=1)]


def check_text(text: str) -> str:
    """The text itself; ``ValueError`` if it holds half of a surrogate pair, or a code point that is no character."""
    found = NO_TEXT.search(text)
    if found:
        what = f"U+{ord(MARK):04X}" if found[0] == MARK else f"half of a surrogate pair, \\u{ord(found[0]):04x},"
        raise ValueError(f"{what} at character {found.start()}: it is no character and cannot be encoded")
    return text


def conversation_of(question: Question) -> Conversation:
    """Any question as a conversation: a text is what the user says. ``ValueError`` as for `messages_of`."""
    talk = _as_given(question)
    return Conversation(tuple(messages_of(talk.messages)), talk.arguments)


def _as_given(question: Question) -> Conversation:
    """The same, without a look at the messages."""
    if isinstance(question, Conversation):
        return question
    return Conversation(({"role": "user", "content": question},) if isinstance(question, str) else tuple(question))


def question_of(question: Question) -> str:
    """The text of a question without a chat template: the string itself, or the content of a single user message.

    Raises:
      ValueError: there are several messages, the message has another role, or there is more that only a chat template
        could show.
    """
    if isinstance(question, str):
        return question
    talk = conversation_of(question)
    roles = [m["role"] for m in talk.messages]
    more = [*talk.arguments, *(f for m in talk.messages for f in m if f not in ("role", "content"))]
    if roles != ["user"] or more:
        what = f"a conversation ({', '.join(roles)})" + (f" with {', '.join(map(repr, more))}" if more else "")
        raise ValueError(
            f"{what} needs a chat template: set config.tokenizer.name to pretrained and "
            "config.tokenizer.chat_template to True"
        )
    return talk.messages[0]["content"]


def plain_text(question: Question) -> str:
    """What a question says, for people, judges and tools: the text itself, or the contents of the messages, a line
    each."""
    if isinstance(question, str):
        return question
    return "\n".join(m["content"] for m in _as_given(question).messages if m.get("content"))


def as_json(question: Question) -> Any:
    """The question as JSON can hold it: the text, the messages, or an object with messages and arguments."""
    if isinstance(question, str):
        return question
    talk = _as_given(question)
    messages = [dict(m) for m in talk.messages]
    return {"messages": messages, **talk.arguments} if talk.arguments else messages


def said_more(question: Question, text: str) -> Question:
    """The question, in which a text follows what the user said last.

    Raises:
      ValueError: a conversation in which the user says nothing."""
    if isinstance(question, str):
        return question + text
    talk = conversation_of(question)
    users = [i for i, m in enumerate(talk.messages) if m["role"] == "user"]
    if not users:
        raise ValueError("no message of the user, which more text could follow")
    messages = list(talk.messages)
    messages[users[-1]] = {**messages[users[-1]], "content": messages[users[-1]]["content"] + text}
    return Conversation(tuple(messages), talk.arguments)


def text_said(answer: Said) -> str:
    """The text of an answer without a chat template; ``ValueError`` for a message with more than content."""
    if isinstance(answer, str):
        return answer
    more = [name for name in answer if name not in ("role", "content")]
    if more:
        raise ValueError(f"an answer with {', '.join(map(repr, more))} needs a chat template that reads it")
    return answer["content"]


def plain_answer(answer: Said) -> str:
    """The text of an answer, for people, judges and alphabets; of a message, its content."""
    return answer if isinstance(answer, str) else answer["content"]


def key_of(question: Question) -> str:
    """A text that is equal for equal questions."""
    if isinstance(question, str):
        return question
    return json.dumps(as_json(question), sort_keys=True, default=str)


# ---- one message


def _message(value: Any, where: str) -> dict[str, Any]:
    """One message in the form that `messages_of` describes."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be an object with role and content, found {value!r:.60}")
    given = {k: v for k, v in value.items() if v is not None}
    if "role" not in given and "from" in given:  # ShareGPT
        given = {"role": given["from"], "content": given.get("value"), **given}
        given = {k: v for k, v in given.items() if k not in ("from", "value")}
        given["role"] = OTHER_ROLES.get(given["role"], given["role"])
    role = given.pop("role", None)
    if not isinstance(role, str) or not role:
        raise ValueError(f"{where} has no role: it must have role and content, and has {', '.join(value) or 'nothing'}")
    where = f"{where} ({role})"
    content = given.pop("content", None)
    if content is None and not given.keys() - NAMES:
        raise ValueError(f"{where}: its content is {'null' if 'content' in value else 'missing'}")
    message = {"role": role, "content": "" if content is None else _content(content, where), **given}
    check_calls(given.get("tool_calls", ()), where)
    for text in strings(message):
        try:
            check_text(text)
        except ValueError as error:
            raise ValueError(f"{where} has {error}") from None
    return message


def _content(value: Any, where: str) -> str:
    """The content as one text; parts of a type other than text are an error."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where}: its content must be a text or a list of parts, found {value!r:.60}")
    texts = []
    for part in value:
        text = part.get("text") if isinstance(part, Mapping) else part
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text" or not isinstance(text, str):
            raise ValueError(f"{where}: a part of its content is no text, all that a policy reads: {part!r:.60}")
        texts.append(text)
    return "".join(texts)


def check_calls(value: Any, where: str) -> None:
    """Raise ``ValueError`` for calls of tools whose arguments are neither objects nor JSON."""
    if not isinstance(value, list | tuple) or not all(isinstance(call, Mapping) for call in value):
        raise ValueError(f"{where}: its tool_calls must be a list of objects, found {value!r:.60}")
    with_arguments(value, lambda given: from_text(given, f"{where}: arguments of a tool call"))


def with_arguments(calls: Sequence[Mapping[str, Any]], form: Callable[[Any], Any]) -> list[Mapping[str, Any]]:
    """Calls of tools with their arguments in another form."""

    def of(function: Any) -> Any:
        known = isinstance(function, Mapping) and "arguments" in function
        return {**function, "arguments": form(function["arguments"])} if known else function

    return [{**call, "function": of(call["function"])} if "function" in call else of(call) for call in calls]


def from_text(value: Any, what: str) -> Any:
    """The value; read as JSON if it is a text. Raises ``ValueError`` that begins with ``what``."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"{what}: not JSON: {error}") from None


def strings(value: Any) -> Iterator[str]:
    """Every text in nested lists and dictionaries, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)
