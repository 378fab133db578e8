"""Messages in one form, whatever data write; and what is said where they are none."""

import json

import pytest

from jaxpo.text.conversations import Conversation, as_json, key_of, messages_of, plain_text, question_of, text_said

USER = {"role": "user", "content": "hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"city": "Paris"}}}

FORMS = {
    "plain": ([USER], [USER]),
    "one message": (USER, [USER]),
    "null fields": ([{**USER, "name": None, "tool_calls": None}], [USER]),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "h"}, {"text": "i"}]}], [USER]),
    "ShareGPT": ([{"from": "human", "value": "hi"}], [USER]),
    "calls": (
        [{"role": "assistant", "content": None, "tool_calls": [CALL]}],
        [{"role": "assistant", "content": "", "tool_calls": [CALL]}],
    ),
    "thoughts alone": (
        [{"role": "assistant", "content": None, "reasoning_content": "hm"}],
        [{"role": "assistant", "content": "", "reasoning_content": "hm"}],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_messages_have_one_form(form):
    given, wanted = FORMS[form]
    assert messages_of(given) == wanted and messages_of(messages_of(given)) == wanted


WRONG = {
    "is a list without messages": [],
    "found None": None,
    "found 'hi'": "hi",
    r"message 1 must be an object with role and content, found None": [None],
    r"message 2 has no role: it must have role and content, and has content": [USER, {"content": "a"}],
    r"message 1 \(user\): its content is missing": [{"role": "user"}],
    r"message 1 \(user\): its content is null": [{"role": "user", "content": None, "name": "Ann"}],
    r"message 1 \(user\): its content must be a text or a list of parts, found 7": [{"role": "user", "content": 7}],
    r"a part of its content is no text, .* 'image'": [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
    r"its tool_calls must be a list of objects": [{"role": "assistant", "tool_calls": "f()"}],
    r"arguments of a tool call: not JSON": [{"role": "assistant", "tool_calls": [{"arguments": "{"}]}],
    r"message 1 \(user\) has half of a surrogate pair, \\ud83d": [{"role": "user", "content": "a\ud83d"}],
    r"message 1 \(tool\) has half of a surrogate pair": [{"role": "tool", "content": "a", "name": "\udc00"}],
    r"has U\+FDD0 at character 0": [{"role": "user", "content": "\ufdd0<|im_end|>"}],
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_no_message_is_told(message):
    with pytest.raises(ValueError, match=message) as error:
        messages_of(WRONG[message])
    assert "\n" not in str(error.value)


def test_a_question_as_text():
    talk = [{"role": "system", "content": "be brief"}, USER]
    assert question_of("hi") == question_of([USER]) == question_of(Conversation((USER,))) == "hi"
    assert plain_text("hi") == plain_text([USER]) == "hi" and plain_text(talk) == "be brief\nhi"
    for question, what in (
        (talk, r"a conversation \(system, user\) needs a chat template"),
        ([{**USER, "name": "Ann"}], r"a conversation \(user\) with 'name' needs"),
        (Conversation((USER,), {"tools": []}), r"a conversation \(user\) with 'tools' needs"),
    ):
        with pytest.raises(ValueError, match=what):
            question_of(question)
    assert text_said("yes") == text_said({"role": "assistant", "content": "yes"}) == "yes"
    with pytest.raises(ValueError, match="an answer with 'tool_calls' needs a chat template"):
        text_said({"role": "assistant", "content": "", "tool_calls": [CALL]})


def test_equal_questions_have_equal_keys():
    again = {"content": "hi", "role": "user"}
    assert key_of([USER]) == key_of((again,)) == key_of(Conversation((USER,))) != key_of("hi")
    asked = Conversation((USER,), {"tools": [{"name": "f"}]})
    assert key_of(asked) != key_of([USER])
    assert as_json("hi") == "hi" and as_json((USER,)) == [USER]
    assert json.loads(json.dumps(as_json(asked))) == {"messages": [USER], "tools": [{"name": "f"}]}
