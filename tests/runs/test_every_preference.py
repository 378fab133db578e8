"""Every preference objective of the registry is trained for two iterations, from a file and on judged answers."""

import json

import numpy as np
import pytest

from jaxpo.config.fill import fill, objective_of, protocol_name
from jaxpo.fields import JUDGED, PAIR
from jaxpo.learning.needs import form_of, is_reward_model
from jaxpo.objectives import make
from jaxpo.registry import entry, names
from tests.runs import tiny

MODULES = ("preference", "preference_multi", "nash", "reward_models")
ALL = [name for name in names() if entry(name).factory.__module__ in [f"jaxpo.objectives.{m}" for m in MODULES]]
OFFLINE = [name for name in ALL if form_of(make(name), 2)]
# What a judge can say of the policy's own answers: pairs of them, labels, and how often each beats the others.
ONLINE = [
    name
    for name in ALL
    if not is_reward_model(make(name))
    and (make(name).unit.layout == PAIR or make(name).asks.needs & {"pref_opp", "label"})
    and make(name).protocol.name != "seppo"
]
OPTIONS = {
    "srpo": {"data.draft_prompt": "{prompt}{draft}"},
    "rationale_dpo": {"data.rationale_prompt": "{prompt}{chosen}{rejected}"},
    "rationale_orpo": {"data.rationale_prompt": "{prompt}{chosen}{rejected}"},
    "preference_orchestrator": {"heads.gate": 3},
    "themis": {"sampling.max_new_tokens": 8},
    "nash_mp": {"protocol": {"name": "nash_mp", "stage": 1}},
}
BASE = {
    "steps": 2,
    "training.epochs": 1,
    "warm_start.steps": 0,
    "evaluation.pass_at": (),
    "evaluation.every": 2,
    "sampling.max_new_tokens": 4,
    "rollout.prompts": 4,
    "rollout.responses": 2,
}


@pytest.fixture(autouse=True, scope="module")
def quick():
    with tiny.quick():
        yield


def pair(i):
    """A pair with everything that is known of any."""
    a, b = i % 4, i // 4
    prompt, other = f"{a}{b}", f"{(a + 1) % 4}{b}"
    chosen, rejected = f"{b}{a}", f"{b}{(a + 1) % 4}"
    return {
        **{"prompt": prompt, "chosen": chosen, "rejected": rejected, "pref_prob": 0.8, "margin": 0.5},
        **{"win_chosen": 0.7, "win_rejected": 0.2, "rm": {"chosen": 2.0, "rejected": -0.5}},
        **{"pref_score": {"chosen": 0.5, "rejected": -1}, "rm_scores": [i / 4, 1.0, -i / 2]},
        **{"rationale": "01", "expert": chosen, "matching": chosen},
        "violating": {"prompt": other, "completion": chosen},
        "multi_chosen": {"prompt": prompt + "3", "completion": chosen},
        "multi_rejected": {"prompt": prompt + "3", "completion": rejected},
    }


def traced(i):
    """A pair with tool calls."""
    row = pair(i)
    calls = {f"{role}_trace": [["tool", row[role]], ["observation", row["prompt"]]] for role in PAIR}
    return row | calls


def edited(i):
    """An expert's edit of one token."""
    row = pair(i)
    right, wrong = row["chosen"], row["rejected"]
    return {
        **{"prompt": row["prompt"], "truth": right, "revised": right + "3", "original": wrong + "3"},
        **{"corrupted_prompt": row["prompt"][1:], "severity": {"revised": [[right, 2.5]], "original": [[wrong, 2.5]]}},
        "relevance_revised": [[right[1], 3.0]],
    }


def judge(questions, answers):
    """Scores that differ wherever the answers do."""
    return [[len(text) / 3 + sum(map(ord, text)) % 7 for text in row] for row in answers]


def trained(path, name, **more):
    changes = {**BASE, **more, "objective": {"name": name}}
    options = dict(OPTIONS.get(name, {}))
    data = changes.get("data", {})
    changes["data"] = {**data, **{k[5:]: options.pop(k) for k in list(options) if k.startswith("data.")}}
    if not data:
        del changes["data"]
    done = tiny.run(tiny.config(options | changes if "protocol" in more else changes | options), path / "run")
    lines = tiny.trained(done.path)
    assert len(lines) == 2 and "AGAIN" not in done.printed
    for line in lines:
        assert np.isfinite(line["loss"]) and line["step/empty"] == line["step/nonfinite"] == 0
    assert max(line["grad_norm"] for line in lines) > 0
    return done


def from_file(path, name):
    form = form_of(make(name), 2)
    make_row = edited if form.kind == "edited" else traced if form.segments else pair
    (path / "data.jsonl").write_text("\n".join(json.dumps(make_row(i)) for i in range(16)))
    file = {"data": {"name": "jsonl", "path": str(path / "data.jsonl"), "test_size": 3}}
    config = fill(tiny.config({**BASE, **file, "objective": {"name": name}}))
    if protocol_name(config, objective_of(config)) not in ("preference_data", "seppo"):
        file["protocol"] = {"name": "preference_data"}
    done = trained(path, name, **file)
    last = [line for line in tiny.untimed(done.path / "metrics.jsonl") if line["step"] == 2]
    held = {k: v for line in last for k, v in line.items() if k.startswith("eval/")}
    measured = "own" not in form.layout  # what is held out has no fresh samples beside it
    assert measured == bool(held.keys() & {"eval/loss", "eval/accuracy"}) and all(map(np.isfinite, held.values()))
    assert measured or held["eval/drift_chosen"] != 0


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFLINE)
def test_from_a_file(name, tmp_path):
    from_file(tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONLINE)
def test_on_judged_answers(name, tmp_path):
    trained(tmp_path, name, judge={"name": "function", "path": f"{__name__}:judge"})


def test_every_objective_has_a_source_of_data():
    assert set(ALL) == {*OFFLINE, *ONLINE}
    assert {name for name in ALL if make(name).asks.needs & JUDGED} <= {*OFFLINE, *ONLINE}
