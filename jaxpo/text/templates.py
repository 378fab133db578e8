"""Chat templates write conversations: what asks for an answer, where the answer begins, and the token that ends it.

All three are found by rendering. Control tokens such as ``<|im_end|>`` are meant only where the template writes them:
where data spell one, `MARK` is put before it (`jaxpo.text.control`).
"""

import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from jaxpo.registry import unknown
from jaxpo.text.control import Markup, any_of, mark
from jaxpo.text.conversations import MARK, Conversation, Message, with_arguments
from jaxpo.text.metered import metered, with_limits

PROBE = Conversation(({"role": "user", "content": "Who asks?"},))
ANSWER = "Somebody"


class Noted(dict):
    """A message that notes which of its fields a template looks at, in ``_noted``."""

    def __init__(self, fields: Mapping[str, Any]):
        super().__init__(fields)
        self._noted: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._noted.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._noted.add(key)
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:  # dict(message) then asks for each field
        return super().__iter__()

    def get(self, key: str, default: Any = None) -> Any:
        self._noted.add(key)
        return super().get(key, default)

    def items(self) -> Any:
        self._noted.update(super().keys())
        return super().items()

    def values(self) -> Any:
        self._noted.update(super().keys())
        return super().values()

    def unread(self) -> list[str]:
        """The fields that say something and were not looked at. A role may be told by its place alone."""
        return [k for k, v in super().items() if k not in self._noted and k != "role" and v not in ("", [], {})]


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with its arguments.

    tokenizer: the object of transformers that holds it.
    arguments: arguments that every conversation gets (``enable_thinking``).
    may_stay_unread: fields of messages, and arguments that data give, that the template need not read.
    control: finds control tokens in data; None = data may hold them.
    end: the token that ends an answer.
    own_end: the token that the template writes after an answer, where the end is named; "" = it writes none.
    rest: what the template writes after an answer without such a token.
    lead: what it writes between its prompt and an answer; None = an answer does not go on from the prompt.
    headless: whether ``lead`` is a header: the template has no generation prompt.
    written: the tokenizer's added tokens that it writes around a question or after an answer.
    """

    tokenizer: Any
    arguments: Mapping[str, Any]
    may_stay_unread: tuple[str, ...]
    control: re.Pattern | None
    end: str = ""
    own_end: str = ""
    rest: str = ""
    lead: str | None = None
    headless: bool = False
    written: frozenset[str] = frozenset()

    def prompt(self, talk: Conversation) -> Markup:
        """The prompt that asks for an answer.

        Raises:
          ValueError: the template refuses the conversation, does not read a part of it, or has no generation prompt.
        """
        if self.headless:
            raise ValueError(
                f"the chat template has no generation prompt: it writes {self.lead!r} before an answer, but not "
                "when it is asked for a prompt (add_generation_prompt)"
            )
        return Markup(self.write(talk, ask=True))

    def answered(self, talk: Conversation, answer: str | Message) -> tuple[Markup, Markup]:
        """The prompt, and what the template writes after it up to the end of the answer.

        Raises:
          ValueError: as for `prompt`; or what the template writes with the answer does not begin with the prompt, nor
            does the answer begin with what only the prompt has.
        """
        said = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
        prompt = self.prompt(talk).marked
        whole = self.write(replace(talk, messages=(*talk.messages, said)), ask=False)
        same = shared(prompt, whole)
        opened, after = prompt[same:], whole[same:]
        if opened.strip():  # a line break that only the prompt has is no difference
            text = self.marked(said["content"].strip())
            before, found, rest = whole.rpartition(text) if text else (whole, "", "")
            if self.lead is None or not found or not before.endswith(self.lead):
                return Markup(prompt), Markup(self.marked(goes_on(opened, after, said)))
            after = self.lead + found + rest  # the template writes the question in another way, but not the answer
        ends = [m.start() for m in re.finditer(f"(?<!{MARK}){re.escape(self.end)}", after)]
        return Markup(prompt), Markup(after[: ends[-1]] if ends else after.removesuffix(self.rest))

    def write(self, talk: Conversation, ask: bool) -> str:
        """The conversation as the template writes it, with `MARK` before control tokens that come from data.

        Args:
          ask: whether it asks for an answer (``add_generation_prompt``).

        Raises:
          ValueError: the template refuses the conversation, or does not read a part of it.
        """
        arguments = {**self.arguments, **self.marked(talk.arguments)}
        source = self.tokenizer.get_chat_template(None, arguments.get("tools"))
        for name in arguments.keys() - {*self.may_stay_unread}:
            if name not in read_by(source):
                raise ValueError(f"the chat template does not read this: {unknown('argument', name, read_by(source))}")
        variables = {"tools": None, "documents": None, **self.tokenizer.special_tokens_map, **arguments}
        variables |= {"add_generation_prompt": ask}

        def render(form: Callable[[Any], Any]) -> tuple[str, list[Noted]]:
            messages = [Noted(self.marked(as_read(m, source, form))) for m in talk.messages]
            with metered():
                return compiled(source).render(messages=messages, **variables), messages

        try:
            try:
                text, messages = render(as_object)
            except TypeError:  # some templates join the arguments of calls to the text as they are
                text, messages = render(as_text)
        except Exception as error:  # the template is a program of other people
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"the chat template refuses the conversation: {reason}") from error
        for i, message in enumerate(messages, start=1):
            left = [name for name in message.unread() if name not in self.may_stay_unread]
            if left:
                raise ValueError(
                    f"message {i} ({dict.get(message, 'role')}): the chat template does not read {', '.join(left)}: "
                    "leave that out of the data, or name it in config.tokenizer.may_stay_unread"
                )
        return text

    def marked(self, value: Any) -> Any:
        """The value with `MARK` before every control token in its texts."""
        if isinstance(value, str):
            return mark(value, self.control)
        if isinstance(value, Mapping):
            return {self.marked(k): self.marked(v) for k, v in value.items()}
        return [self.marked(v) for v in value] if isinstance(value, list | tuple) else value


def chat_template_of(
    tokenizer: Any, arguments: Mapping[str, Any], end: str | None = None, may_stay_unread: Sequence[str] = ()
) -> ChatTemplate:
    """The chat template of a tokenizer of transformers, with the token that ends an answer, found by rendering one.

    Args:
      arguments: arguments that every conversation gets.
      end: the token that ends an answer, instead of what the template writes after one.
      may_stay_unread: fields of messages, and arguments that data give, that the template need not read.

    Raises:
      ValueError: the template cannot be read, does not read one of ``arguments``, or writes no token after an answer.
    """
    names = read_by(tokenizer.get_chat_template(None, arguments.get("tools")))
    for name in arguments:
        if name not in names:
            raise ValueError(unknown("field of config.tokenizer.template_arguments", name, names))
    template = ChatTemplate(tokenizer, dict(arguments), tuple(may_stay_unread), None, end or "")
    answer = {"role": "assistant", "content": ANSWER}
    try:
        asked, unasked = (template.write(PROBE, ask) for ask in (True, False))
        whole = template.write(replace(PROBE, messages=(*PROBE.messages, answer)), ask=False)
    except ValueError as error:
        if end:
            return template
        raise ValueError(
            f"the end of an answer cannot be found: {error}; set config.tokenizer.end to the token that ends answers"
        ) from None
    before, found, after = whole.rpartition(ANSWER)
    if not found:
        raise ValueError("the chat template does not write what the assistant says")
    lead = before[len(asked) :] if before.startswith(asked) else None
    found = added_tokens(tokenizer).search(after)
    template = replace(
        template,
        end=end or end_of(after, tokenizer),
        own_end=found[0] if found else "",
        lead=lead,
        headless=asked == unasked and bool((lead or "").strip()),
        written=frozenset(added_tokens(tokenizer).findall(unasked + after)),
    )
    return template if template.end in after else replace(template, rest=after)


def shared(a: str, b: str) -> int:
    """How many characters two texts share at their beginning."""
    most = min(len(a), len(b))
    return next((i for i in range(most) if a[i] != b[i]), most)


def as_read(message: Message, source: str, form: Callable[[Any], Any]) -> dict[str, Any]:
    """A message as a template reads it: calls with arguments in the ``form``, and beside them content that is null for
    a template that asks whether it is."""
    if not message.get("tool_calls"):
        return dict(message)
    content = None if not message["content"] and asks_for_null(source) else message["content"]
    return {**message, "content": content, "tool_calls": with_arguments(message["tool_calls"], form)}


def as_object(arguments: Any) -> Any:
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def goes_on(opened: str, instead: str, said: Message) -> str:
    """The rest of an answer that begins with what only the prompt has: a prompt that opens ``<think>``, and an answer
    that thinks; ``ValueError`` for any other answer.

    Args:
      opened: what only the prompt has.
      instead: what the template writes there before the answer.
    """
    text = said["content"].lstrip()
    if said.keys() != {"role", "content"} or not text.startswith(opened.strip()):
        raise ValueError(
            f"the chat template asks by a prompt that ends with {opened[-40:]!r}, but it does not begin this answer "
            f"so: it writes {instead[:40]!r}"
        )
    return text.removeprefix(opened if text.startswith(opened) else opened.strip())


def end_of(after: str, tokenizer: Any) -> str:
    """The first token in what a template writes after an answer; the tokenizer's own end if it writes only space."""
    found = added_tokens(tokenizer).search(after)
    if found:
        return found[0]
    if after.strip() or not tokenizer.eos_token:
        raise ValueError(
            f"the chat template writes {after!r} after an answer, and no token that ends it: set config.tokenizer.end "
            "to the token that ends answers"
        )
    return tokenizer.eos_token


def added_tokens(tokenizer: Any) -> re.Pattern:
    """Finds the tokens that were added to the vocabulary, special or not, and the end of sequence; none of space."""
    tokens = [*map(str, tokenizer.added_tokens_decoder.values()), tokenizer.eos_token or ""]
    return any_of(token for token in tokens if token.strip())


@lru_cache
def asks_for_null(source: str) -> bool:
    """Whether a template asks if a content is none."""
    nodes = importlib.import_module("jinja2.nodes")
    tests = (t.node for t in compiled(source).environment.parse(source).find_all(nodes.Test) if t.name == "none")
    fields = (n.attr if isinstance(n, nodes.Getattr) else getattr(getattr(n, "arg", None), "value", "") for n in tests)
    return "content" in fields


@lru_cache
def read_by(source: str) -> list[str]:
    """The names of the arguments that a template reads; ``ValueError`` if it is no template."""
    try:
        environment = compiled(source).environment
        names = importlib.import_module("jinja2.meta").find_undeclared_variables(environment.parse(source))
    except importlib.import_module("jinja2").TemplateError as error:
        raise ValueError(f"the chat template cannot be read: {error}") from None
    return sorted(names - environment.globals.keys() - {"messages", "add_generation_prompt"})


@lru_cache
def compiled(source: str) -> Any:
    """The template as transformers compiles it, in a sandbox, with its filters and functions, and with limits of time
    and output (`jaxpo.text.metered`)."""
    # Of an empty template: compiling computes what is constant, which may be much.
    theirs = importlib.import_module("transformers.utils.chat_template_utils")._compile_jinja_template("")
    return with_limits(theirs.environment, source)
