"""What cannot fit is refused before work; running out of memory names the step, the sizes and what helps."""

import json

import jax
import numpy as np
import pytest

from jaxpo.policy.config import TransformerConfig
from jaxpo.protocols.gatherer import Watch
from jaxpo.race.race import race
from jaxpo.runs import memory
from jaxpo.runs.memory import cache_bytes, check_rollout, explained, out_of_memory_explained
from jaxpo.runs.workspace import longest
from jaxpo.tasks import Example
from tests.runs import tiny

SMALL = (10**7, "the limit of ulimit -v")


@pytest.fixture(autouse=True, scope="module")
def quick():
    with tiny.quick():
        yield


def exhausted(size):
    return jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: Out of memory allocating {size} bytes.")


@pytest.mark.parametrize(
    ("phase", "step", "fields"),
    (
        ("generate", "rollout", ("rollout.prompts (8)", "sampling.max_new_tokens (3)", "rollout.prompt_width")),
        ("score", "scoring", ("raise config.training.microbatches (1)",)),
        ("update", "update", ("raise config.training.microbatches (1)", 'set config.policy.remat to "full"')),
        ("evaluate", "evaluation", ("rollout.prompts (8)", "sampling.max_new_tokens (3)")),
    ),
)
def test_out_of_memory_names_the_step_the_sizes_and_the_levers(monkeypatch, phase, step, fields):
    monkeypatch.setattr(memory, "host_memory", lambda: SMALL)
    with pytest.raises(MemoryError) as error, out_of_memory_explained(tiny.config()), Watch().phase(phase):
        raise exhausted(8_887_535_600)
    text = str(error.value)
    assert text.startswith(
        f"out of memory in the {step}: 8.89 GB more were asked for, and the limit of ulimit -v is 0.01"
    )
    assert all(field in text for field in fields) and "\n" not in text


@pytest.mark.parametrize(
    ("error", "said"),
    (
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8.00GiB."),
            "8.59 GB more",
        ),
        (MemoryError("Unable to allocate 2.00 KiB for an array with shape (4,)"), "2.05e-06 GB more"),
        (MemoryError(), "more was asked for"),
    ),
)
def test_the_sizes_of_other_messages(error, said):
    assert said in str(explained(error))


@pytest.mark.parametrize(
    "error", (jax.errors.JaxRuntimeError("INTERNAL: a bug"), ValueError("RESOURCE_EXHAUSTED"), KeyError(1))
)
def test_other_errors_stay_what_they_are(error):
    assert explained(error) is None
    with pytest.raises(type(error)), out_of_memory_explained(tiny.config()):
        raise error


def test_the_bytes_of_a_cache():
    model = TransformerConfig(10, width=8, layers=3, heads=4, kv_heads=2, dtype="bfloat16")
    assert cache_bytes(model, prompts=5, width=7, responses=2, new=11) == 2 * 3 * 2 * 2 * 2 * 5 * (7 + 2 * 11)
    check_rollout(model, 5, 7, 2, 11)


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        (
            {"policy.width": 10**8},
            r"config.policy: the run needs at least .* GB on each device \(parameters .*config.lora",
        ),
        (
            {"sampling.max_new_tokens": 10**9},
            r"a rollout of 8 prompts .* completions each of 1,000,000,000 tokens, needs",
        ),
        ({"rollout.prompts": 8 * 10**9}, r"a rollout of 8,000,000,000 prompts .* lower config.rollout.prompts"),
    ),
)
def test_absurd_sizes_are_refused_before_work(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.run(tiny.config(changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_race_of_too_many_seeds_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"seeds 100,000,000: .* lower --seeds \(at most [\d,]+\)"):
        race("grpo", seeds=10**8, out=tmp_path / "race")
    assert not (tmp_path / "race").exists()


def test_a_prompt_that_is_far_longer_than_the_others_is_named(tmp_path, monkeypatch):
    examples = [Example(i, f"{i}+1=", str(i + 1), {}) for i in range(150)]
    assert longest(examples, [range(4 + i % 3) for i in range(150)]) == ""
    sizes = [4 if i != 70 else 3_000_000 for i in range(150)]
    assert longest(examples, [range(n) for n in sizes]).startswith(
        "the longest prompt (3,000,000 tokens, 750,000 times what is usual; it is item 71 of its data and begins "
    )
    path, long = tmp_path / "task.jsonl", "1" * 30_000
    lines = [{"question": long if i == 2 else str(i), "answer": "1"} for i in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {"name": "jsonl", "path": str(path), "test_size": 2}
    config = tiny.config({"task": task, "tokenizer": {"name": "characters"}, "warm_start.steps": 0})
    monkeypatch.setattr(memory, "host_memory", lambda: (3 * 10**6, "the limit of ulimit -v"))
    with pytest.raises(ValueError, match=r"is item 3 of its data .* set config.rollout.prompt_width"):
        tiny.run(config, tmp_path / "run")


def test_the_memory_of_the_host_has_a_name():
    size, what = memory.host_memory()
    assert size > 10**8 and isinstance(what, str) and np.isfinite(size)
