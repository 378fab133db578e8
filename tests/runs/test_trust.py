"""Runs with code of one's own: what opens them knows their names, and what came from elsewhere runs nothing."""

import json
import shutil
import stat
import sys

import pytest

from experiments import evaluate, export, race, sample
from jaxpo import registry
from jaxpo.config.command_line import parse
from jaxpo.config.fields import default
from jaxpo.config.fill import fill
from jaxpo.runs import trust
from jaxpo.runs.judges.judge import by_model
from jaxpo.runs.restore import open_finished
from tests.runs import tiny

OWN = '''
from jaxpo import policy_gradient, register
from jaxpo.objectives.parts import advantages, ratios, surrogates
from jaxpo.primitives import aggregation
from jaxpo.tasks.toy import toy as builtin

LOADED = True


@register()
def centered_clip_{n}(eps: float = 0.2):
    """A clipped surrogate of centered rewards."""
    return policy_gradient(
        advantage=advantages.leave_one_out(),
        ratio=ratios.token(),
        surrogate=surrogates.clipped(eps, eps),
        aggregate=aggregation.token_mean,
    )


@register("task", id="tens_{n}")
def tens(train_size: int = 25, test_size: int = 5, seed: int = 0, digits: int = 2):
    """The toy task under another name."""
    return builtin(train_size=train_size, test_size=test_size, seed=seed, digits=digits, base=4)


def reward(completion, answer):
    """Nothing is right."""
    return 0.0
'''


@pytest.fixture(autouse=True, scope="module")
def quick():
    with tiny.quick():
        yield


@pytest.fixture(autouse=True)
def own_key(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / "state"))
    yield
    trust.trust_runs(False)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    return tiny.finished(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """A module of one's own on the path: its name, which its names end with."""
    folder, name = tmp_path_factory.mktemp("own"), "own_module"
    (folder / f"{name}.py").write_text(OWN.replace("{n}", "own"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield name
        forget(name)


def forget(name):
    """As in another process: the module is not loaded, and nothing of it is registered."""
    sys.modules.pop(name, None)
    for key in [key for key, row in registry._TABLE.items() if row.factory.__module__ == name]:
        del registry._TABLE[key]


@pytest.fixture(scope="module")
def own(module, finished, tmp_path_factory):
    """A run with a task and an objective of one's own, from a config that imports their module as a file would."""
    state = tmp_path_factory.getbasetemp() / "state"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(state))
        __import__(module)
        changes = {"task": {"name": "tens_own"}, "objective": {"name": "centered_clip_own"}}
        path = tiny.run(tiny.warm(finished, changes), tmp_path_factory.mktemp("runs") / "own").path
    forget(module)
    return path


def elsewhere(run, folder, **changes):
    """A copy of a run whose config.json somebody has changed."""
    shutil.copytree(run, folder)
    config = json.loads((folder / "config.json").read_text())
    for block, value in changes.items():
        config[block] = value if not isinstance(value, dict) else {**config[block], **value}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_run_keeps_the_modules_that_registered_its_names(own, module):
    assert json.loads((own / "config.json").read_text())["imports"] == [module]
    assert module not in sys.modules


def test_ones_own_run_is_evaluated_sampled_and_exported(own, module, tmp_path, capsys):
    sample.main([f"--run={own}", "--prompt=12", "--greedy"])
    export.main([f"--workdir={own}", f"--out={tmp_path / 'model'}"])
    assert module not in sys.modules and (tmp_path / "model" / "model.safetensors").is_file()
    evaluate.main([f"--run={own}", "--k="])
    assert "greedy" in capsys.readouterr().out and module in sys.modules
    forget(module)


def test_a_run_may_be_moved_and_stays_ones_own(own, module, tmp_path):
    shutil.copytree(own, tmp_path / "moved")
    assert open_finished(str(tmp_path / "moved"))[0].config.task.name == "tens_own"
    forget(module)


def test_what_writes_needs_no_code_of_the_run(own, module, tmp_path, monkeypatch, capsys):
    """Not even where the module is gone, or another user opens the run."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "own" not in p.rpartition("/")[2]])
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    sample.main([f"--run={own}", "--prompt=12"])
    with pytest.raises(SystemExit, match="names code that would run: own_module; you did not write .* add --trust"):
        evaluate.main([f"--run={own}", "--k="])
    with pytest.raises(
        SystemExit, match="config.imports names the module 'own_module', which is not found .*PYTHONPATH"
    ):
        evaluate.main([f"--run={own}", "--k=", "--trust"])
    assert not trust.key_file().exists()


@pytest.mark.parametrize(
    "changes",
    (
        {"imports": ["evil_module"]},
        {"trace": "evil_module:reward"},
        {"judge": {"name": "function", "path": "evil_module:reward", "scale": None}},
        {"task": {"name": "jsonl", "path": "x", "reward": "evil_module:reward", "test_size": 2}},
        {"task": {"name": "jsonl", "path": "x", "test_size": 2, "rewards": {"two": {"reward": "evil_module:reward"}}}},
        {"task": {"name": "jsonl", "path": "x", "test_size": 2, "rewards": {"evil_module:reward": {"weight": 1.0}}}},
        {"task": {"name": "jsonl", "path": "x", "test_size": 2, "reward": "relevance", "embed": "evil_module:reward"}},
    ),
)
@pytest.mark.parametrize("program", ("evaluate", "sample", "export", "judge"))
def test_a_run_from_elsewhere_runs_nothing(finished, own, tmp_path, monkeypatch, program, changes):
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'made')!r}, 'w')\ndef reward(*_): return 0.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = elsewhere(finished.path, tmp_path / "run", **changes)
    shutil.copy(own / trust.SIGNATURE, run)  # of other names
    said = "names code that would run: evil_module.*add --trust"
    if program == "evaluate":
        with pytest.raises(SystemExit, match=said):
            evaluate.main([f"--run={run}", "--k="])
    elif program == "judge":
        with pytest.raises(ValueError, match=said):
            by_model(str(run), None)
    elif program == "sample":
        sample.main([f"--run={run}", "--prompt=12"])
    else:
        export.main([f"--workdir={run}", f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "made").exists() and "evil_module" not in sys.modules


@pytest.mark.parametrize("content", ("", "[]", "{}", '{"signature": null}', '{"signature": "é"}'))
def test_a_broken_signature_is_none(own, tmp_path, content):
    run = elsewhere(own, tmp_path / "run")
    (run / trust.SIGNATURE).write_text(content)
    with pytest.raises(ValueError, match="add --trust"):
        open_finished(str(run))


def test_trust_uses_the_code(own, module, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    evaluate.main([f"--run={own}", "--k=", "--trust"])
    assert "greedy" in capsys.readouterr().out
    forget(module)
    with pytest.raises(SystemExit, match="add --trust"):  # it is asked for each time
        evaluate.main([f"--run={own}", "--k="])


def test_the_key_is_ones_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    config = {"imports": ("a",), "task": {"name": "toy"}}
    signed = trust.signature(config)
    assert stat.S_IMODE(trust.key_file().stat().st_mode) == 0o600
    assert signed == trust.signature(config) and trust.signature({"imports": (), "task": None}) is None
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    assert trust.signature(config)["signature"] != signed["signature"]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match="cannot be written: set XDG_STATE_HOME"):
        trust.signature(config)


def test_a_cache_of_compiled_programs_from_elsewhere_is_not_used(finished, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("jaxpo.runs.restore.prepare_process", seen.append)
    open_finished(str(elsewhere(finished.path, tmp_path / "run", compilation_cache=str(tmp_path))), examples=False)
    assert seen == [None]


# ---- config.imports -------------------------------------------------------------------------------------------------


def test_modules_are_named_on_the_command_line(module):
    flags = [f"--config={tiny.FILE}", "--config.task.name=tens_own", "--config.objective.name=centered_clip_own"]
    with pytest.raises(ValueError, match="unknown objective 'centered_clip_own': .*name its module in config.imports"):
        parse(flags)
    for text in (module, f"('{module}',)", f"{module},json"):
        config, _ = parse([*flags, f"--config.imports={text}"])
        assert config.imports[0] == module and config.task.train_size == 25
        forget(module)


@pytest.mark.parametrize(
    ("imports", "message"),
    (
        (("no_such_module",), "config.imports names the module 'no_such_module', which is not found"),
        (("os:system",), "config.imports: 'os:system' is no name of a module"),
        (("../x",), "is no name of a module"),
        ((3,), "config.imports: 3 is no name of a module"),
        (("broken_module",), "config.imports: the module 'broken_module' fails when it is imported: NameError"),
    ),
)
def test_modules_that_cannot_be_loaded(imports, message, tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("undefined\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = default()
    config.imports = imports
    with pytest.raises(ValueError, match=message) as error:
        fill(config)
    assert "\n" not in str(error.value)


def test_a_race_knows_ones_own_objectives(module, tmp_path):
    rules = [
        "--seeds=1",
        "--steps=1",
        "--warm_start=0",
        "--prompts=4",
        "--evaluations=1",
        "--responses=2",
        "--width=8",
        "--layers=1",
    ]
    flags = [
        "--objectives=centered_clip_own",
        "--task=tens_own(train_size=9, test_size=5)",
        f"--out={tmp_path / 'out'}",
        *rules,
    ]
    with pytest.raises(SystemExit, match="name its module in config.imports .in a race: --imports"):
        race.main(flags)
    with pytest.raises(SystemExit, match="--imports names the module 'nothing'"):
        race.main([*flags, "--imports=nothing"])
    results = race.main([*flags, f"--imports={module}", "--minibatches=1", "--max_new_tokens=4"])
    assert list(results.objectives) == ["centered_clip_own"]
    forget(module)


@pytest.mark.parametrize("content", ("{", "[]", "[1]", '{"imports": "evil"}', '{"steps": "x"}', "[" * 100_000, "\x00"))
def test_a_config_that_is_none_is_named(finished, tmp_path, content):
    run = elsewhere(finished.path, tmp_path / "run")
    (run / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json is not the config of a run: ") as error:
        open_finished(str(run))
    assert "\n" not in str(error.value)


def test_a_reward_model_by_an_objective_of_ones_own_does_not_write(finished, tmp_path, monkeypatch):
    run = elsewhere(finished.path, tmp_path / "run", objective={"name": "my_reward_model"})
    sample.main([f"--run={run}", "--prompt=12"])
    monkeypatch.setattr("jaxpo.runs.restore.saved_paths", lambda *_: {("params", "heads", "score", "bias")})
    with pytest.raises(SystemExit, match="run holds a reward model .head score., which writes no answers"):
        sample.main([f"--run={run}", "--prompt=12"])


def test_functions_of_a_protocol_are_code_and_its_texts_are_not():
    protocol = {"name": "scope", "prm": "mine:scores", "corrector": "demonstration", "separator": "Step: ", "n": 3}
    assert trust.code_named({"protocol": protocol}) == ["mine:scores"]
