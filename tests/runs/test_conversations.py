"""Conversations through a run: where its sampler stops, what it demonstrates, what it drops, what a judge reads."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments.export import export_run
from jaxpo.config.command_line import parse
from jaxpo.config.resolve import resolve
from jaxpo.policy.config import TransformerConfig
from jaxpo.policy.hf import export as write_model
from jaxpo.policy.transformer import init
from jaxpo.runs.questions import as_told, tokenize
from jaxpo.runs.workspace import setup
from jaxpo.tasks import Example
from jaxpo.text.tokenizers import PretrainedTokenizer
from tests.runs import tiny
from tests.text.chat_models import CHATML, CHATML_TOKENS, HEADLESS, MODELS, tokenizer_of

USER, SYSTEM = {"role": "user", "content": "hi"}, {"role": "system", "content": "be brief"}


@pytest.fixture(autouse=True, scope="module")
def quick():
    with tiny.quick():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name of a template -> a model folder with random weights."""
    root = tmp_path_factory.mktemp("models")
    made = {name: MODELS[name][0]() for name in ("gemma", "qwen3")}
    made |= {"base": tokenizer_of(CHATML_TOKENS, "<|endoftext|>", CHATML)}
    made |= {"headless": tokenizer_of(CHATML_TOKENS, "<|endoftext|>", HEADLESS)}
    for name, tokenizer in made.items():
        config = TransformerConfig(vocab_size=len(tokenizer), width=16, layers=1, heads=2)
        write_model(init(config, jax.random.key(0)), config, str(root / name), tokenizer=tokenizer)
    return root


def config_of(folder, changes=None, **tokenizer):
    """A run that begins with the model in the folder, whose generation_config.json names no ends."""
    out = tiny.config({"warm_start.steps": 0, "steps": 0, "evaluation.pass_at": (), "evaluation.prompts": 2})
    out.policy = ConfigDict(dict(name="pretrained", path=str(folder)))
    out.tokenizer = ConfigDict(dict(name="pretrained", path=str(folder), **tokenizer))
    with out.unlocked():
        for path, value in (changes or {}).items():
            *blocks, field = path.split(".")
            block = out[blocks[0]] if blocks else out
            block[field] = value
    return out


def test_a_model_that_a_template_asks_stops_at_the_templates_end(folders):
    base = setup(config_of(folders / "base"))
    assert base.sampling.eos_ids[:2] == (2, 0)
    shown = base.questions.demonstrations(np.arange(2))
    assert [row[on > 0][-1] for row, on in zip(shown.completions, shown.mask, strict=True)] == [2, 2]
    assert setup(config_of(folders / "base", end="<|endoftext|>")).sampling.eos_ids[0] == 0


def test_options_of_the_tokenizer_reach_it(folders):
    default, changed = (
        setup(config_of(folders / "base", **options)).tokenizer
        for options in ({}, {"control_tokens_in_data": True, "may_stay_unread": ("name",)})
    )
    assert len(default.encode("<|im_end|>")) == 10 and changed.encode("<|im_end|>") == [2]
    assert changed.render([{**USER, "name": "Ann"}]) == default.render("hi")
    with pytest.raises(ValueError, match="does not read name"):
        default.render([{**USER, "name": "Ann"}])


def test_a_control_token_stops_as_a_stop_string(folders):
    sampling = setup(config_of(folders / "base", {"sampling.stop": ("<|im_start|>", "so")})).sampling
    table = np.asarray(sampling.stop_table)
    assert table[0, 1] == len(table) - 1 and table[0, 2] == 0
    with pytest.raises(ValueError, match=r"'<\|im_end\|>\\n' has the control token '<\|im_end\|>' beside other text"):
        setup(config_of(folders / "base", {"sampling.stop": ("<|im_end|>\n",)}))


def pairs(folder, *records):
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(dict(chosen="a", rejected="b") | record) + "\n" for record in records))
    return file


def on_data(folder, file, bad, changes=None):
    """A run on the pairs of a file, whose prompts are its task."""
    data = ConfigDict(dict(name="jsonl", path=str(file), bad=bad))
    objective = ConfigDict(dict(name="dpo"))
    own = {"task": ConfigDict(dict(name=None)), "data": data, "objective": objective}
    return config_of(folder, own | {"sampling.max_new_tokens": 8} | (changes or {}))


@pytest.mark.parametrize("judged", [False, True])
def test_a_row_that_the_template_refuses_is_dropped_with_its_prompt(folders, tmp_path, capsys, judged):
    file = pairs(tmp_path, {"prompt": [USER], "id": 7}, {"prompt": [SYSTEM, USER]}, {"prompt": "how are you?"})
    judge = ConfigDict(dict(name="function", path="tests.runs.test_conversations:nothing"))
    changes = {"protocol": ConfigDict(dict(name="judged")), "judge": judge} if judged else {}
    workspace = setup(on_data(folders / "gemma", file, "drop", changes))
    asked = [e.question for e in workspace.questions.train.examples]
    assert asked == [(USER,), "how are you?"] and workspace.questions.train.examples[1].where.endswith("jsonl:3")
    assert len(workspace.preferences.train) == 2 and workspace.report["data/dropped"] == 1
    assert "pairs.jsonl: nothing reads the columns id" in capsys.readouterr().out
    with pytest.raises(ValueError, match="pairs.jsonl:2: .*System role not supported"):
        setup(on_data(folders / "gemma", file, "error", changes))


def nothing(questions, answers):
    return np.zeros((len(answers), len(answers[0])))


def test_a_file_without_a_row_that_can_be_shown(folders, tmp_path):
    file = pairs(tmp_path, {"prompt": [USER]})
    with pytest.raises(ValueError, match="no rows to train on: all 1 were dropped"):
        setup(on_data(folders / "headless", file, "drop"))


def test_an_answer_that_thinks_is_demonstrated_whole(folders, tmp_path):
    thought = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    file = pairs(tmp_path, {"prompt": [USER], "chosen": [thought]})
    workspace = setup(on_data(folders / "qwen3", file, "error", {"sampling.max_new_tokens": 16}))
    shown = workspace.questions.demonstrations(np.array([0]))
    ids = shown.completions[0][shown.mask[0] > 0].tolist()
    assert workspace.tokenizer.decode(ids) == "<think>\nhm\n</think>\n\na" and ids[-1] == 2
    short = workspace.questions.demonstrations(np.array([0]), drop_last=1.0)
    assert workspace.tokenizer.decode(short.completions[0][short.mask[0] > 0].tolist()) == "<think>\nhm\n</think>\n\n"
    with pytest.raises(ValueError, match=r"pairs.jsonl:1: .*does not read reasoning_content"):
        setup(on_data(folders / "base", file, "error"))


@pytest.mark.parametrize("question, what", [([SYSTEM, USER], "System role not supported"), ("a\ud83d", "surrogate")])
def test_a_question_that_cannot_be_asked_is_named_by_its_place(question, what):
    tokenizer = PretrainedTokenizer(MODELS["gemma"][0](), True)
    good, bad = Example(0, "hi", None, {}), Example(1, question, None, {}, "data.jsonl, line 2")
    with pytest.raises(ValueError, match=f"data.jsonl, line 2: question: .*{what}"):
        tokenize([good, bad], tokenizer, None)
    (kept,), (ids,) = tokenize([Example(0, [USER], None, {})], tokenizer, None)
    assert tokenizer.decode(ids) == "user\nhi\nmodel\n" and kept.question == [USER]


def test_a_judge_reads_what_a_policy_may_write():
    """What the template shows is shown; any other answer follows the prompt as it is."""
    tokenizer = PretrainedTokenizer(MODELS["gemma"][0](), True)
    asks = Example(0, "q", None, {})
    assert as_told(tokenizer, asks, " yes ") == tokenizer.turn("q", "yes")
    assert tokenizer.decode(as_told(tokenizer, asks, "").answer) == ""
    for answer, question in (({"role": "assistant", "content": "", "tool_calls": [{}]}, "q"), ("yes", [SYSTEM])):
        with pytest.raises(ValueError, match="pairs:1: a judge reads it: the chat template|does not read tool_calls"):
            as_told(tokenizer, Example(0, question, None, {}, "pairs:1"), answer)
    odd = as_told(PretrainedTokenizer(MODELS["r1"][0](), True), asks, "yes\ufdd0<|eos|>")
    assert odd.text == "yes\ufffd<|eos|>" and odd.answer.count(1) == 1 and odd.answer[-1] == 1


def test_template_arguments_are_flags(tmp_path):
    library, file = MODELS["qwen3"][0](), tmp_path / "config.py"
    library.save_pretrained(tmp_path / "model")
    block = dict(name="pretrained", path=str(tmp_path / "model"), template_arguments=dict(day="Monday"))
    made = f"def get_config():\n    return tiny.config({{'tokenizer': {block}}})\n"
    file.write_text(f"from tests.runs import tiny\n{made}")
    flag = "--config.tokenizer.template_arguments"
    flags = [f"{flag}.enable_thinking=false", f"{flag}.n=3", f"{flag}.who=me"]
    config, _ = parse([f"--config={file}", *flags, "--config.tokenizer.may_stay_unread=('name',)"])
    assert config.tokenizer.may_stay_unread == ("name",)
    assert config.tokenizer.template_arguments.to_dict() == dict(day="Monday", enable_thinking=False, n=3, who="me")
    with pytest.raises(ValueError, match="unknown field of config.tokenizer.template_arguments 'day'"):
        resolve(config, 1).tokenizer(list)
    with config.unlocked():
        config.tokenizer.template_arguments = ConfigDict(dict(enable_thinking=False))
    tokenizer = resolve(config, 1).tokenizer(list)
    assert tokenizer.render("q").endswith("</think>\n\n")
    with pytest.raises(ValueError, match="unknown field of config.tokenizer 'template_arguments'"):
        parse([f"--config={tiny.FILE}", f"{flag}.enable_thinking=False"])


def test_an_export_says_where_answers_end(folders, tmp_path):
    run = tiny.run(config_of(folders / "base"), tmp_path / "run")
    export_run(str(run.path), str(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"][:2] == [2, 0]
