"""A table of bad inputs: what a hostile or unlucky user would try, and the line that each gets.

A row is an input and a part of the line. Every line is one line; nothing is silent, hangs or ends in a traceback. Other
tables of this kind stand beside what they test (``test_cli.py``, ``tests/runs/test_trust.py``, ``tests/tasks``).
"""

import json
import re

import pytest

from experiments import (
    compare,
    evaluate,
    export,
    plan,
    race,
    sample,
    score_pairs,
    train_preference,
    train_reward,
    train_rl,
    train_sft,
)
from jaxpo.config.command_line import parse
from jaxpo.config.resolve import resolve
from jaxpo.objectives import make
from jaxpo.race.contenders import select
from jaxpo.race.rules import Rules
from jaxpo.race.setup import make_task
from jaxpo.runs.train import check_start
from jaxpo.runs.workspace import setup
from tests.policy import tiny_gguf
from tests.runs import tiny

WHOLE = "must be a whole number"
DEEP = "[" * 100_000
HUGE = "1" + "0" * 400


@pytest.fixture(autouse=True, scope="module")
def quick():
    with tiny.quick():
        yield


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with files that are not what they should be."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name, text in {
        "file": "x",
        "data.jsonl": '{"question": "1", "answer": "2"}\n{"question": "2", "answer": "3"}\n',
        "syntax.py": "x = (\n",
        "number.py": "def get_config():\n    return 3\n",
        "absent.py": "x = 3\n",
        "constant.py": "get_config = 3\n",
        "raises.py": "def get_config():\n    return undefined\n",
        "imports.py": "import no_such_module\n",
        "exits.py": "1 / 0\n",
        "null.py": "x = '\0'\n",
    }.items():
        (tmp_path / name).write_text(text)


def refused(message, call, *arguments):
    """The call ends with one line that has the message in it, as ``ValueError`` or as the end of a program."""
    with pytest.raises((ValueError, OSError, ModuleNotFoundError, SystemExit)) as error:
        call(*arguments)
    line = str(error.value)
    assert message in line and "\n" not in line and len(line) < 2500, line


# ---- fields of a config, on the command line -------------------------------------------------------------------------

FIELDS = (
    ("seed=-1", "config.seed must be a whole number in [0, 4294967295], not -1"),
    ("seed=abc", "--config.seed=abc"),
    ("seed=1.5", "--config.seed=1.5"),
    ("seed=99999999999999999999999", "config.seed must be"),
    ("seed.x=1", "unknown field of config.seed 'x'"),
    ("steps=-1", f"config.steps {WHOLE}"),
    ("steps=1e3", "--config.steps=1e3"),
    ("steps=nan", "--config.steps=nan"),
    ("sead=1", "did you mean 'seed'"),
    ("=3", "unknown field of config ''"),
    ("task.name=toyy", "did you mean 'toy'"),
    ("task.name=mine", "if it is of your own, name its module in config.imports"),
    ("task.name=None", "config.task.name is None"),
    ("task.size=3", "did you mean 'test_size'"),
    ("task.train_size=abc", "--config.task.train_size=abc"),
    ("data.name=jsnl", "did you mean 'jsonl'"),
    ("data.fields=abc", "unknown field of config.data 'fields'"),
    ("trace=abc", "config.trace has no effect"),
    ("trace=nomodule:f", "config.trace has no effect"),
    ("judge.name=verify", "did you mean 'verifier'"),
    ("judge.scale=-1", "config.judge.scale has no effect"),
    ("tokenizer.name=chars", "did you mean 'characters'"),
    ("tokenizer.base=x", "--config.tokenizer.base=x"),
    ("policy.name=transformr", "did you mean 'transformer'"),
    ("policy.name=pretrained", "policy 'pretrained' needs path"),
    ("policy.width=0", f"policy.width {WHOLE}"),
    ("policy.width=-8", f"policy.width {WHOLE}"),
    ("policy.width=15", "policy.head_dim 7 must be even"),
    ("policy.layers=0", f"policy.layers {WHOLE}"),
    ("policy.heads=3", "policy.head_dim 5"),
    ("policy.heads=0", f"policy.heads {WHOLE}"),
    ("policy.dtype=float7", "policy.dtype must be float32 or bfloat16"),
    ("policy.path=/nowhere", "unknown field of config.policy 'path'"),
    ("lora.rank=-1", f"config.lora.rank {WHOLE}"),
    ("lora.rank=4", "set config.policy.name to pretrained"),
    ("lora.alpha=0", "config.lora.alpha must be a positive number"),
    ("lora.alpha=nan", "config.lora.alpha must be a positive number"),
    ("lora.targets=abc", "unknown lora target 'abc'"),
    ("heads.embed=-3", "config.heads.embed is -3"),
    ("heads.embed=abc", "--config.heads.embed=abc"),
    ("soup.of=abc", "config.soup.of must name two run directories"),
    ("soup.alpha=2", "config.soup.alpha must be a number in [0, 1]"),
    ("soup.alpha=nan", "config.soup.alpha must be a number in [0, 1]"),
    ("references.teacher=/nowhere", "config.references.teacher has no effect"),
    ("objective.name=grp", "did you mean 'grpo'"),
    ("objective.eps=-1", "grpo: eps must be a positive number"),
    ("objective.beta=nan", "grpo: beta must be a number"),
    ("objective.beta=inf", "grpo: beta must be a number"),
    ("objective.beta=x", "--config.objective.beta=x"),
    ("objective.nothing=1", "unknown field of config.objective 'nothing'"),
    ("optimizer.name=adma", "did you mean 'adam'"),
    ("optimizer.learning_rate=-1", "optimizer.learning_rate must be a positive number"),
    ("optimizer.learning_rate=nan", "optimizer.learning_rate must be a positive number"),
    ("optimizer.learning_rate=inf", "optimizer.learning_rate must be a positive number"),
    ("optimizer.learning_rate=0", "optimizer.learning_rate must be a positive number"),
    ("optimizer.clip_norm=-1", "optimizer.clip_norm must be a positive number"),
    ("optimizer.clip_norm=nan", "optimizer.clip_norm must be a positive number"),
    ("optimizer.b1=2", "optimizer.b1 must be a finite number of at least 0 below 1"),
    ("optimizer.b2=nan", "optimizer.b2 must be a finite number"),
    ("optimizer.eps=-1", "optimizer.eps must be a finite number"),
    ("optimizer.weight_decay=nan", "optimizer.weight_decay must be a finite number"),
    ("optimizer.weight_decay=-1", "optimizer.weight_decay must be a finite number"),
    ("optimizer.schedule.name=linaer", "did you mean 'linear'"),
    ("optimizer.schedule.warmup_steps=-1", f"warmup_steps {WHOLE}"),
    ("optimizers.critic.name=adma", "did you mean 'adam'"),
    ("optimizers.critic.learning_rate=1", "set config.optimizers.critic.name"),
    ("rollout.prompts=0", f"config.rollout.prompts {WHOLE}"),
    ("rollout.prompts=7", "does not divide config.rollout.prompts 7"),
    ("rollout.responses=0", f"config.rollout.responses {WHOLE}"),
    ("rollout.prompt_width=0", f"config.rollout.prompt_width {WHOLE}"),
    ("rollout.prompt_width=-5", f"config.rollout.prompt_width {WHOLE}"),
    ("rollout.mesh.data=0", "rollout.mesh.data must be -1 (the rest) or at least 1"),
    ("rollout.mesh.tensor=7", "rollout.mesh"),
    ("sampling.max_new_tokens=0", f"config.sampling.max_new_tokens {WHOLE}"),
    ("sampling.max_new_tokens=abc", "--config.sampling.max_new_tokens=abc"),
    ("sampling.temperature=0", "sampling.temperature must be a positive number"),
    ("sampling.temperature=nan", "sampling.temperature must be a positive number"),
    ("sampling.temperature=inf", "sampling.temperature must be a positive number"),
    ("sampling.top_k=0", f"sampling.top_k {WHOLE}"),
    ("sampling.top_p=0", "sampling.top_p must be a number in (0, 1]"),
    ("sampling.top_p=2", "sampling.top_p must be a number in (0, 1]"),
    ("sampling.min_p=nan", "sampling.min_p must be a number in [0, 1]"),
    ("sampling.stop=('',)", "config.sampling.stop must hold texts that are not empty"),
    ("sampling.stop=(1,)", "config.sampling.stop must hold texts"),
    ("training.epochs=0", f"config.training.epochs {WHOLE}"),
    ("training.minibatches=3", "choose one of 1, 2, 4, 8"),
    ("training.microbatches=5", "choose one of 1, 2, 4, 8, 16"),
    ("training.packing=maybe", "--config.training.packing=maybe"),
    ("policy_temperature=0", "config.policy_temperature must be a positive number"),
    ("policy_temperature=nan", "config.policy_temperature must be a positive number"),
    ("warm_start.steps=-1", f"config.warm_start.steps {WHOLE}"),
    ("warm_start.batch=0", f"config.warm_start.batch {WHOLE}"),
    ("warm_start.drop_last=2", "config.warm_start.drop_last must be a number in [0, 1]"),
    ("warm_start.optimizer.name=x", "unknown optimizer 'x'"),
    ("warm_start.optimizer.weight_decay=inf", "warm_start.optimizer.weight_decay must be a finite number"),
    ("evaluation.every=0", f"config.evaluation.every {WHOLE}"),
    ("evaluation.prompts=0", f"config.evaluation.prompts {WHOLE}"),
    ("evaluation.pass_at=abc", "config.evaluation.pass_at must be a tuple"),
    ("evaluation.pass_at=('a',)", "config.evaluation.pass_at must be a tuple"),
    ("evaluation.pass_at=(0,)", "config.evaluation.pass_at must be a tuple"),
    ("evaluation.pass_at=(99,)", "config.evaluation.samples is 4"),
    ("evaluation.samples=100000000", "config.evaluation.samples 100,000,000: so many completions"),
    ("evaluation.samples=0", f"config.evaluation.samples {WHOLE}"),
    ("checkpoint.every=0", f"config.checkpoint.every {WHOLE}"),
    ("checkpoint.keep=0", f"config.checkpoint.keep {WHOLE}"),
    ("checkpoint.keep_best=eval/best", "did you mean 'eval/reward'"),
    ("mesh.data=0", "mesh.data must be -1"),
    ("mesh.fsdp=0", "mesh.fsdp must be -1"),
    ("mesh.tensor=3", "does not fit 1 devices"),
    ("mesh.nothing=1", "unknown field of config.mesh 'nothing'"),
    ("protocol.name=onpolicy", "did you mean 'on_policy'"),
    ("protocol.nothing=3", "unknown field of config.protocol 'nothing'"),
    ("logging.samples=-1", f"config.logging.samples {WHOLE}"),
    ("logging.plot_seconds=-1", "config.logging.plot_seconds must be a number of at least 0"),
    ("logging.plot_seconds=nan", "config.logging.plot_seconds must be a number of at least 0"),
    ("logging.tensorboard=perhaps", "--config.logging.tensorboard=perhaps"),
    ("nonfinite_patience=0", f"config.nonfinite_patience {WHOLE}"),
    ("imports=3", "config.imports: '3' is no name of a module"),
    ("imports=no_module", "config.imports names the module 'no_module', which is not found"),
    ("imports=os:system", "config.imports: 'os:system' is no name of a module"),
)


@pytest.mark.parametrize(("override", "line"), FIELDS, ids=[override for override, _ in FIELDS])
def test_fields(override, line):
    refused(line, lambda: resolve(parse([f"--config={tiny.FILE}", f"--config.{override}"])[0], 1))


# ---- fields that need their task, data or model to be wrong ----------------------------------------------------------

STARTS = (
    ("task.train_size=0", f"toy: train_size {WHOLE}"),
    ("task.digits=-1", f"toy: digits {WHOLE}"),
    ("task.base=1", "toy: base must be a whole number in [2, 36]"),
    ("tokenizer.base=99", "base must be a whole number in [2, 36]"),
    ("tokenizer.name=pretrained", "tokenizer 'pretrained' needs path"),
    ("data.name=jsonl", "preference set 'jsonl' needs path"),
    ("data.name=jsonl data.path=data.jsonl data.fields=abc", "fields must be a dictionary, our name of"),
    ("data.name=datasets", "preference set 'datasets' needs path"),
    ("task.name=jsonl", "task 'jsonl' needs path"),
    ("task.name=jsonl task.path=/nowhere task.test_size=1", "/nowhere"),
    ("task.name=jsonl task.path=empty task.test_size=1", "empty"),
    ("task.name=jsonl task.path=file task.test_size=1", "file, line 1"),
    ("task.name=jsonl task.path=data.jsonl", "give exactly one of test_path, test_split and test_size"),
    ("task.name=jsonl task.path=data.jsonl task.test_size=2", "test_size=2 leaves nothing to train on"),
    ("task.name=jsonl task.path=data.jsonl task.test_size=1 task.reward=exat", "did you mean 'exact'"),
    ("task.name=reasoning_gym", "task 'reasoning_gym' needs dataset, train_size, test_size, seed"),
    ("init_from=/nowhere", "config.init_from '/nowhere' is no run directory with a checkpoint"),
    ("init_from=file", "config.init_from 'file' is no run directory with a checkpoint"),
    ("init_from=empty", "config.init_from 'empty' is no run directory with a checkpoint"),
    ("soup.of=('a','b')", "config.soup.of 'a' is no run directory with a checkpoint"),
    ("objective.name=bradley_terry_rm", "config.data.name is None"),
    ("rollout.prompt_width=1", "config.rollout.prompt_width 1 is shorter than every training prompt"),
)


@pytest.mark.parametrize(("overrides", "line"), STARTS, ids=[overrides for overrides, _ in STARTS])
def test_starts(overrides, line):
    def start():
        flags = [f"--config.{override}" for override in ("warm_start.steps=0", *overrides.split())]
        check_start(setup(parse([f"--config={tiny.FILE}", *flags])[0]))

    refused(line, start)


# ---- files of models -------------------------------------------------------------------------------------------------

VOCABULARY = "tokenizer.ggml."
MODELS = (  # what is harmed, and the line
    ("cut", "model.gguf (500 bytes) is truncated or no GGUF file"),
    ("empty", "model.gguf (0 bytes) is truncated or no GGUF file (it is empty)"),
    ("text", "it does not begin with GGUF"),
    ("tensors", "tensors where"),
    ("fields", "fields where"),
    (dict(values={"llama.block_count": 4_000_000_000}), "with llama.block_count 4,000,000,000: the file is not whole"),
    (
        dict(values={"llama.embedding_length": 2**31}),
        "but the field llama.embedding_length would make it [266, 2147483648]",
    ),
    (dict(values={"llama.attention.head_count": 0}), "llama.attention.head_count is '0', not a whole number"),
    (dict(values={"llama.rope.freq_base": -1.0}), "llama.rope.freq_base is '-1.0', not a positive number"),
    (dict(architecture="mamba"), "unknown GGUF architecture 'mamba'"),
    (dict(leave_out="blk.0.attn_q.weight"), "lacks tensors, the first is blk.0.attn_q.weight"),
    (dict(drop=["llama.context_length"]), "the field llama.context_length is missing"),
    (dict(drop=[f"{VOCABULARY}tokens"]), "tokenizer.ggml.tokens is missing"),
    (dict(drop=[f"{VOCABULARY}merges"]), "tokenizer.ggml.merges is missing"),
    (dict(values={f"{VOCABULARY}token_type": [1, 2]}), "tokenizer.ggml.token_type has 2 entries"),
    (dict(values={f"{VOCABULARY}token_type": [9] * 266}), "tokenizer.ggml.token_type of token 0 is 9"),
    (dict(values={f"{VOCABULARY}merges": ["not there"]}), "tokenizer.ggml.merges holds 'not there'"),
    (
        dict(values={f"{VOCABULARY}eos_token_id": 99_999}),
        "tokenizer.ggml.eos_token_id is 99999, and there are 266 tokens",
    ),
    (dict(values={f"{VOCABULARY}model": "wordpiece"}), "unknown GGUF vocabulary 'wordpiece'"),
)


@pytest.mark.parametrize(("harm", "line"), MODELS, ids=[line for _, line in MODELS])
def test_gguf_files(tmp_path, harm, line):
    file = tmp_path / "model.gguf"
    tiny_gguf.write(file, **(harm if isinstance(harm, dict) else {}))
    data = bytearray(file.read_bytes())
    if harm in ("tensors", "fields"):
        at = 8 if harm == "tensors" else 16
        data[at : at + 8] = (2**60).to_bytes(8, "little")
    file.write_bytes({"cut": data[:500], "empty": b"", "text": b"not a model"}.get(str(harm), bytes(data)))

    def start():
        named = ("policy", "tokenizer")
        flags = [f"--config.{x}.{key}" for x in named for key in ("name=pretrained", f"path={file}")]
        check_start(setup(parse([f"--config={tiny.FILE}", "--config.warm_start.steps=0", *flags])[0]))

    refused(line, start)


# ---- strings that name objectives, parts and tasks with their options -------------------------------------------

OPTIONS = "options are plain values"
NAMED = "write a name, or name(option=value) with every option named"
CALLS = (
    ("x for x in y", "names or calls are expected"),
    ("", "names or calls are expected"),
    ("\0", "null bytes"),
    ("NAME(", "closing parenthesis"),
    ("NAME]", "unmatched ']'"),
    (f"NAME({DEEP}", "is no"),
    (f"NAME(eps_high={'-' * 5000}1)", "is no"),
    ("()", NAMED),
    ("x.y", NAMED),
    ("1", NAMED),
    ("'NAME'", NAMED),
    ("*NAME", NAMED),
    ("NAME := 1", NAMED),
    ("NAME if 1 else 2", NAMED),
    ("lambda: 0", NAMED),
    ("NAME()()", NAMED),
    ("NAME(0.2)", NAMED),
    ("NAME(**{'a': 1})", NAMED),
    ("NAME(eps_high=1, eps_high=2)", "eps_high is given twice"),
    ("NAME(eps_high={[]: 1})", OPTIONS),
    ("NAME(eps_high={{}})", OPTIONS),
    ("NAME(eps_high=nan)", OPTIONS),
    ("NAME(eps_high=10**400)", OPTIONS),
    ("NAME(eps_high=__import__('os'))", OPTIONS),
    ("NAME(eps_hi=1)", "did you mean 'eps_high'"),
    ("NAME(eps_high='x')", "eps_high must be a positive number"),
    ("NAME(eps_high=[])", "eps_high must be a positive number"),
    ("NAME(eps_high=True)", "eps_high must be a positive number"),
    ("NAME(eps_high=1j)", "eps_high must be a positive number"),
    ("NAME(eps_high=-1)", "eps_high must be a positive number"),
    ("NAME(eps_high=1e999)", "eps_high must be a positive number, not inf"),
    (f"NAME(eps_high={HUGE})", "eps_high must be a positive number"),
    ("NAM_", "unknown"),
)


@pytest.mark.parametrize(("text", "line"), CALLS, ids=range(len(CALLS)))
def test_calls(text, line):
    surrogate, objective = text.replace("NAME", "clipped"), text.replace("NAME", "grpo")
    refused(line, lambda: make("policy_gradient", surrogate=surrogate))
    refused(line, lambda: select(objective, Rules(), 8))


PARTS = (
    (dict(surrogate="clipped, clipped"), "surrogate takes one part"),
    (dict(surrogate="2 * clipped"), "surrogate takes one part"),
    (dict(surrogate=3), "surrogate must be a string"),
    (dict(surrogate=None), "surrogate must be a string"),
    (dict(surrogate=b"clipped"), "surrogate must be a string"),
    (dict(advantage=""), "advantage ''"),
    (dict(ratio="tokn"), "did you mean 'token'"),
    (dict(agg="2 * token_mean"), "aggregation takes one part"),
    (dict(filters="2 * mixed_groups"), "a filter has no coefficient"),
    (dict(shaping="x"), "unknown reward 'x'"),
    (dict(corrections="abc"), "unknown correction 'abc'"),
    (dict(regularizers="nan * entropy"), "a coefficient must be a number"),
    (dict(regularizers="1e999 * entropy"), "a coefficient must be a number"),
    (dict(regularizers="True * entropy"), "a coefficient must be a number"),
    (dict(regularizers="'a' * entropy"), "a coefficient must be a number"),
    (dict(regularizers="{[]: 1} * entropy"), "a coefficient must be a number"),
    (dict(regularizers="entropy * 0.1"), "a coefficient must be a number"),
    (dict(regularizers=f"{HUGE} * entropy"), "a coefficient must be a number"),
    (dict(regularizers="0.1 * entropy - kl_to_reference"), NAMED),
    (dict(regularizers="0.1 ** entropy"), NAMED),
    (dict(regularizers="entropi"), "did you mean 'entropy'"),
)


@pytest.mark.parametrize(("parts", "line"), PARTS, ids=str)
def test_parts(parts, line):
    refused(line, lambda: make("policy_gradient", **parts))


TASKS = (
    ("toyy", "did you mean 'toy'"),
    ("toy,toy", "a race has exactly one"),
    ("", "is no list"),
    ("toy(", "is no list"),
    ("toy(digits=0)", f"toy: digits {WHOLE}"),
    ("toy(digits='x')", f"toy: digits {WHOLE}"),
    ("toy(digits=[])", f"toy: digits {WHOLE}"),
    ("toy(**{})", NAMED),
    ("toy(seed={[]: 1})", OPTIONS),
    (f"toy(digits={'9' * 5000})", "is no list"),
    ("jsonl", "task 'jsonl' needs path"),
    ("jsonl(path='/nowhere', test_size=1)", "/nowhere"),
)


@pytest.mark.parametrize(("text", "line"), TASKS, ids=range(len(TASKS)))
def test_tasks_of_a_race(text, line):
    refused(line, lambda: make_task(text))


RULES = (
    (dict(steps=0), f"steps {WHOLE}"),
    (dict(seeds=1.5), f"seeds {WHOLE}"),
    (dict(learning_rate=float("nan")), "learning_rate must be a positive number"),
    (dict(prompts=7), "minibatches 4 does not divide prompts 7"),
    (dict(width=0), f"width {WHOLE}"),
    (dict(flipped=2), "flipped must be a number in [0, 1]"),
    (dict(task=3), "task must be a string"),
    (dict(steps=10**400), f"steps {WHOLE}"),
)


@pytest.mark.parametrize(("rules", "line"), RULES, ids=range(len(RULES)))
def test_rules_of_a_race(rules, line):
    refused(line, lambda: Rules(**rules))


# ---- config files ----------------------------------------------------------------------------------------------------

FILES = (
    ("/nowhere.py", "unknown config file '/nowhere.py'"),
    ("empty", "unknown config file 'empty'"),
    ("", "unknown config file"),
    ("raisez.py", "did you mean 'raises.py'"),
    ("file", "file, line 1: NameError"),
    ("syntax.py", "syntax.py, line 1: SyntaxError"),
    ("number.py", "number.py: get_config() returns a int: start from jaxpo.config.fields.default()"),
    ("absent.py", "absent.py has no function get_config()"),
    ("constant.py", "constant.py has no function get_config()"),
    ("raises.py", "raises.py, line 2: NameError: name 'undefined' is not defined"),
    ("imports.py", "imports.py, line 1: ModuleNotFoundError: No module named 'no_such_module'"),
    ("exits.py", "exits.py, line 1: ZeroDivisionError"),
    ("null.py", "null.py"),
)


@pytest.mark.parametrize(("path", "line"), FILES, ids=[path or "none" for path, _ in FILES])
@pytest.mark.parametrize("program", (train_rl, train_preference, train_reward, train_sft, plan))
def test_config_files(program, path, line):
    refused(line, program.main, [f"--config={path}"])


# ---- programs --------------------------------------------------------------------------------------------------------

CONFIG = "--config=FILE is required"
PROGRAMS = (
    *((p, "", CONFIG) for p in (train_rl, train_preference, train_reward, train_sft, plan)),
    *((p, "--workdir=x", CONFIG) for p in (train_rl, train_preference, train_reward, train_sft)),
    *((p, f"--config={tiny.FILE}", "--workdir=DIRECTORY is required") for p in (train_rl, train_reward, train_sft)),
    *((p, "--nothing=1", "unknown flag '--nothing'") for p in (evaluate, sample, export, race, score_pairs, plan)),
    *((p, "abc", "flags are written --name=value") for p in (evaluate, sample, export, race, score_pairs, plan)),
    *((p, "--config.seed=1", CONFIG) for p in (evaluate, sample, export, race, score_pairs)),
    *((p, "--trust=maybe", "--trust=maybe") for p in (evaluate, sample, export, score_pairs)),
    (evaluate, "", "--run=DIRECTORY is required"),
    (evaluate, "--run=", "--run=DIRECTORY is required"),
    (evaluate, "--run", "--run"),
    (evaluate, "--run=/nowhere", "unknown run directory '/nowhere'"),
    (evaluate, "--run=file", "unknown run directory 'file'"),
    (evaluate, "--run=empty", "unknown run directory 'empty'"),
    (evaluate, "--run=empty --step=abc", "--step=abc"),
    (evaluate, "--run=empty --k=1,x", "--k=1,x is no list of whole numbers"),
    (evaluate, "--run=empty --json=no/x.json", "--json=no/x.json: there is no such folder"),
    (sample, "", "--run=DIRECTORY"),
    (sample, "--run=empty", "at least one --prompt"),
    (sample, "--run=empty --prompt=1", "unknown run directory 'empty'"),
    (sample, "--run=empty --prompt=1 --n=0", "--n=0 must be at least 1"),
    (export, "", "--workdir=RUN and --out=DIRECTORY are required"),
    (export, "--workdir=empty --out=x", "unknown run directory 'empty'"),
    (export, "--workdir=empty --out=file", "file"),
    (score_pairs, "", "--pairs is required"),
    (score_pairs, "--pairs=file", "--judge is required"),
    (score_pairs, "--pairs=/nowhere --judge=x --out=y", "/nowhere"),
    (score_pairs, "--pairs=file --judge=x --out=y", "file:1"),
    (score_pairs, "--pairs=data.jsonl --judge=x --out=file", "file is there already"),
    (compare, "abc", "unknown run directory 'abc'"),
    (compare, "abc --out=x.txt", "has to be a .png file"),
    (race, "--imports=no_module", "--imports names the module 'no_module', which is not found"),
    (race, "--steps=0", f"steps {WHOLE}"),
    (race, "--objectives=grop", "did you mean 'grpo'"),
    (race, "--out=file", "file"),
)


@pytest.mark.parametrize(
    ("program", "flags", "line"), PROGRAMS, ids=[f"{p.__name__.split('.')[1]} {flags}" for p, flags, _ in PROGRAMS]
)
def test_programs(program, flags, line):
    refused(line, program.main, flags.split())


def test_the_table_is_long_enough():
    """The count is kept: 150 inputs and those of the pages of faults."""
    tables = (FIELDS, STARTS, MODELS, CALLS, PARTS, TASKS, RULES, FILES, PROGRAMS)
    rows = [json.dumps(row, default=str) for table in tables for row in table]
    assert len(set(rows)) >= 250 and all(re.search(r"\w", row) for row in rows)
