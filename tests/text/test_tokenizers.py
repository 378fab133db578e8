"""Round trips, token bytes, and tokenizers rebuilt from JSON."""

import json
import shutil

import pytest

from jaxpo.text.tokenizers import (
    CharTokenizer,
    IntegerTokenizer,
    PretrainedTokenizer,
    as_pretrained,
    from_json,
    read_files,
    transformers_library,
)
from tests.runs import tiny_model

TEXTS = [
    "Hello, world!",
    "  two  spaces\n\tand a tab ",
    "naïve café — 東京 🙂",
    "def f(x):\n    return x**2",
    "a",
    "",
    " ",
]


# --- characters -------------------------------------------------------------------------------------------------------


def test_characters():
    tokenizer = CharTokenizer("cab")
    assert (tokenizer.pad_id, tokenizer.eos_ids, tokenizer.vocab_size) == (0, (1,), 6)
    assert tokenizer.alphabet == "\nabc"
    assert tokenizer.encode("abc\n") == [3, 4, 5, 2]
    assert tokenizer.render("ab") == "ab\n"
    assert tokenizer.decode([0, 0, 3, 4, 1, 0]) == "ab"
    assert tokenizer.token_bytes() == [b"", b"", b"\n", b"a", b"b", b"c"]


def test_characters_round_trip_and_json():
    tokenizer = CharTokenizer.from_texts(TEXTS, separator="→")
    again = from_json(json.loads(json.dumps(tokenizer.to_json())))
    for text in [*TEXTS, tokenizer.render(TEXTS[2])]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and again.encode(text) == ids
        assert b"".join(tokenizer.token_bytes()[i] for i in ids) == text.encode()
    assert again.to_json() == tokenizer.to_json() and again.render("a") == "a→"


def test_unknown_characters_and_ids_are_named():
    with pytest.raises(ValueError, match="character 'z' of 'az' is not in the alphabet"):
        CharTokenizer("abc").encode("az")
    for bad in (99, -1):
        with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of 6"):
            CharTokenizer("abc").decode([3, bad])
    with pytest.raises(ValueError, match="separator must be one character"):
        CharTokenizer("abc", separator="")
    with pytest.raises(ValueError, match="unknown kind of tokenizer 'chars'"):
        from_json({"kind": "chars"})


def test_integers():
    tokenizer = IntegerTokenizer(10)
    assert (tokenizer.pad_id, tokenizer.eos_ids, tokenizer.vocab_size) == (0, (0,), 12)
    assert tokenizer.encode(tokenizer.render("307")) == [5, 2, 9, 1]
    assert tokenizer.decode([5, 2, 9, 0, 0]) == "307"
    assert from_json(tokenizer.to_json()).encode("90") == [11, 2]
    with pytest.raises(ValueError, match=r"base must be a whole number in \[2, 36\], not"):
        IntegerTokenizer(37)


# --- transformers -----------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE like GPT-2's and Qwen's, trained here."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|im_start|>", "<|im_end|>"]
    backend.train_from_iterator(
        TEXTS * 20,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.add_tokens([AddedToken("<think>", special=False), AddedToken("é è", special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", chat_template=TEMPLATE, additional_special_tokens=special[1:]
    )


@pytest.fixture(scope="module")
def sentencepiece():
    """A BPE with byte fallback like Llama 2's and Gemma's, trained here."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>"]
    backend.train_from_iterator(
        ["hello world", "a b c d two spaces and tab"] * 20,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=[*special, *(f"<0x{b:02X}>" for b in range(256))], show_progress=False
        ),
    )
    spec = json.loads(backend.to_str())  # the trainer makes the bytes special; a real model's are ordinary
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in special]
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(params=["byte_level", "sentencepiece"])
def pretrained(request):
    return PretrainedTokenizer(request.getfixturevalue(request.param), chat_template=False)


@pytest.mark.parametrize("text", [*TEXTS, "<think>x</think>", "é è"])
def test_token_bytes_of_an_encoding_are_the_text(pretrained, text):
    ids = pretrained.encode(text)
    assert b"".join(pretrained.token_bytes()[i] for i in ids) == text.encode()
    assert pretrained.decode(ids) == text


def test_special_tokens_have_no_bytes_and_are_not_decoded(pretrained):
    table = pretrained.token_bytes()
    assert len(table) == pretrained.vocab_size
    assert table[pretrained.pad_id] == b"" and all(table[i] == b"" for i in pretrained.eos_ids)
    ids = pretrained.encode("a b")
    assert pretrained.decode([pretrained.pad_id, *ids, *pretrained.eos_ids, pretrained.pad_id]) == "a b"


def test_pad_falls_back_on_the_end_of_sequence(byte_level):
    tokenizer = PretrainedTokenizer(byte_level, chat_template=False, eos=["<|im_end|>"])
    assert tokenizer.eos_ids == (0, 2) and tokenizer.pad_id == 0


def test_prompts(byte_level, sentencepiece):
    chat = PretrainedTokenizer(byte_level, chat_template=True)
    prompt = chat.render("2+2?")
    assert prompt == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert chat.encode(prompt)[0] == 1 and chat.encode(prompt).count(2) == 1  # one id for each special token
    assert PretrainedTokenizer(byte_level, chat_template=False).render("2+2?") == "2+2?\n"
    base = PretrainedTokenizer(sentencepiece, chat_template=False)
    assert base.render("a b") == "<s>a b\n" and base.encode(base.render("a b"))[0] == 1
    with pytest.raises(ValueError, match="has no chat template"):
        PretrainedTokenizer(sentencepiece, chat_template=True)


@pytest.mark.parametrize("name, chat, eos", [("byte_level", True, ["<|im_end|>"]), ("sentencepiece", False, [])])
def test_json_rebuilds_all_of_it(request, name, chat, eos):
    tokenizer = PretrainedTokenizer(request.getfixturevalue(name), chat, eos)
    again = from_json(json.loads(json.dumps(tokenizer.to_json())))
    for field in ("vocab_size", "pad_id", "eos_ids"):
        assert getattr(again, field) == getattr(tokenizer, field)
    assert again.token_bytes() == tokenizer.token_bytes() and again.render("q?") == tokenizer.render("q?")
    for text in [*TEXTS, tokenizer.render("q?")]:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids and again.decode(ids) == tokenizer.decode(ids)
    assert again.to_json() == tokenizer.to_json()


def test_a_saved_folder_with_several_ends(byte_level, tmp_path):
    byte_level.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    tokenizer = PretrainedTokenizer(tmp_path, chat_template=True)
    assert tokenizer.eos_ids == (2, 0)  # the template's end of a turn comes first
    assert tokenizer.token_bytes() == PretrainedTokenizer(byte_level, chat_template=True).token_bytes()


def test_wrong_tokenizers_are_refused(byte_level):
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    with pytest.raises(ValueError, match="a fast tokenizer of transformers is needed, got dict"):
        PretrainedTokenizer({}, chat_template=False)
    with pytest.raises(ValueError, match=r"unknown eos token '<\|im_ends\|>'.*did you mean '<\|im_end\|>'"):
        PretrainedTokenizer(byte_level, chat_template=False, eos=["<|im_ends|>"])
    backend = Tokenizer(models.WordLevel({"[E]": 0, "a": 1}, unk_token="[E]"))
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        PretrainedTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), chat_template=False)
    backend.decoder = decoders.WordPiece()
    words = PretrainedTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[E]"), chat_template=False)
    with pytest.raises(ValueError, match=r"token_bytes knows .* decodes by \['WordPiece'\]"):
        words.token_bytes()


@pytest.mark.parametrize("question, answer", [("a b", "hello"), ("2+2?", " 4"), ("q", "\n\nx"), ("q", "é </s>")])
def test_a_turn_without_a_template(pretrained, question, answer):
    """The answer follows the prompt as in one text, and has one end."""
    turn = pretrained.turn(question, answer)
    assert turn.prompt == pretrained.encode(pretrained.render(question))
    assert turn.answer[-1] == pretrained.eos_ids[0] and turn.answer.count(turn.answer[-1]) == 1
    kept = answer.removesuffix("</s>") if pretrained.control.keys() & {"</s>"} else answer
    assert pretrained.decode([*turn.prompt, *turn.answer]).endswith(f"{question}\n{kept}")
    assert b"".join(pretrained.token_bytes()[i] for i in turn.answer).decode() == turn.text == kept


def test_characters_take_turns_too():
    turn = CharTokenizer("ab").turn([{"role": "user", "content": "ab"}], "b")
    assert turn == ([3, 4, 2], [4, 1], "b")
    with pytest.raises(ValueError, match="needs a chat template"):
        CharTokenizer("ab").turn([{"role": "system", "content": "a"}], "b")
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        CharTokenizer("ab\ud83d").turn("a\ud83d", "b")


# ---- files of a pretrained tokenizer


def test_the_files_of_a_folder_come_out_as_they_came(tmp_path):
    """Through JSON; what is no text too, and nothing that is not of a tokenizer."""
    tiny_model.write(tmp_path / "model")
    settings = json.dumps({"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 77, "eos_token": "<|im_end|>"})
    (tmp_path / "model/tokenizer_config.json").write_text(settings)
    (tmp_path / "model/tokenizer.model").write_bytes(b"\xff\x00not text")
    (tmp_path / "model/additional_chat_templates").mkdir()
    (tmp_path / "model/additional_chat_templates/tool_use.jinja").write_text("tools")
    (tmp_path / "model/notes.txt").write_text("of the model")
    tokenizer = PretrainedTokenizer(str(tmp_path / "model"), chat_template=True)
    shutil.move(tmp_path / "model", tmp_path / "away")
    again = from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again.to_json() == tokenizer.to_json() and again.render("a") == tokenizer.render("a")
    (tmp_path / "out").mkdir()
    again.save_pretrained(tmp_path / "out")
    came = read_files(tmp_path / "away")
    assert read_files(tmp_path / "out") == {name: x for name, x in came.items() if name != "config.json"}
    assert not (tmp_path / "out/notes.txt").exists() and b"\xff\x00not text" in came.values()


@pytest.mark.parametrize("name", ("../tokenizer.json", "/tmp/tokenizer.json", "run.py", "a/../../tokenizer.json"))
def test_a_tokenizer_writes_only_files_of_tokenizers(name):
    """tokenizer.json of a run may come from elsewhere."""
    with pytest.raises(ValueError, match="unknown file of a tokenizer"):
        from_json({"kind": "pretrained", "files": {name: "{}"}, "chat_template": False, "eos": []})


def test_a_tokenizer_of_an_older_run():
    with pytest.raises(ValueError, match="an older version of jaxpo wrote it"):
        from_json({"kind": "pretrained", "tokenizer": "{}", "options": {}, "special": []})


def test_what_transformers_5_writes_gets_names_that_others_know(tmp_path):
    """A tokenizer that came without files of its own: of a GGUF, or of characters."""
    tiny_model.write(tmp_path / "model")
    (tmp_path / "model/config.json").unlink()  # it would name the class of the family
    theirs = transformers_library().AutoTokenizer.from_pretrained(tmp_path / "model")
    both = {"bytes": PretrainedTokenizer(theirs, True), "letters": as_pretrained(CharTokenizer("ab"))}
    for name, made in both.items():
        (tmp_path / name).mkdir()
        made.save_pretrained(tmp_path / name)
        settings = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in settings
        again = transformers_library().AutoTokenizer.from_pretrained(tmp_path / name)
        assert again.encode("ab") == made.encode("ab") and again.all_special_ids == made._tokenizer.all_special_ids
        assert again.chat_template == made._tokenizer.chat_template


def brings_python(tokenizer, folder, made, entry):
    """A folder whose tokenizer asks for a Python file beside it, which leaves the file ``made`` when it is run."""
    tokenizer.save_pretrained(folder)
    (folder / "tokenization_evil.py").write_text(f"open({str(made)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": entry}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "entry", (["tokenization_evil.Evil", None], [None, "tokenization_evil.Evil"], "tokenization_evil.Evil")
)
def test_a_folders_python_is_never_run_and_never_asked_for(byte_level, tmp_path, monkeypatch, entry):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    folder, made = tmp_path / "folder", tmp_path / "made"
    brings_python(byte_level, folder, made, entry)
    loaded = PretrainedTokenizer(str(folder), chat_template=False)
    assert loaded.encode("hello world") == PretrainedTokenizer(byte_level, False).encode("hello world")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="brings Python code of its own for the tokenizer, which is not run") as error:
        PretrainedTokenizer(str(folder), chat_template=False)
    assert "\n" not in str(error.value) and not made.exists()


def test_a_models_own_python_is_not_run_for_its_tokenizer(byte_level, tmp_path):
    byte_level.save_pretrained(tmp_path)
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "configuration_evil.EvilConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration_evil.py").write_text(f"open({str(tmp_path / 'made')!r}, 'w')\n")
    held = json.loads((tmp_path / "tokenizer_config.json").read_text())
    held.pop("tokenizer_class", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(held))
    assert PretrainedTokenizer(str(tmp_path), chat_template=False).encode("hello")
    assert not (tmp_path / "made").exists()
