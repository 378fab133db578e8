"""Named blocks bring their own fields, flags change them, and what is wrong fails before anything is compiled."""

import itertools

import jax
import pytest
from ml_collections import ConfigDict

from jaxpo.config.blocks import block_of
from jaxpo.config.command_line import parse
from jaxpo.config.fields import default
from jaxpo.config.fill import fill
from jaxpo.config.paths import expand_paths
from jaxpo.config.resolve import resolve
from jaxpo.learning.needs import heads_of
from jaxpo.learning.optimizers import OPTIMIZERS, SCHEDULES
from jaxpo.objectives import make, names
from jaxpo.objectives.grammar.base import Unit
from jaxpo.registry import entry
from jaxpo.runs.train import train_rl
from jaxpo.storage.rundir import RunDirectory
from tests.runs import tiny

FILE = f"--config={tiny.FILE}"
QUICKSTART = f"--config={tiny.ROOT / 'configs/quickstart.py'}"


@pytest.fixture(autouse=True, scope="module")
def quick():
    with tiny.quick():
        yield


def resolved(*flags, file=FILE):
    """The config of a command line, resolved for one device."""
    return resolve(parse([file, *flags])[0], 1)


def of(*flags, file=FILE):
    """The parsed and validated config of a command line, for one device."""
    return resolved(*flags, file=file).config


# ---- names bring their own fields -----------------------------------------------------------------------------------


def test_the_objectives_defaults_are_there_before_flags_are_parsed():
    config = of("--config.objective.name=dapo", "--config.objective.eps_high=0.3")
    assert config.objective.eps_high == 0.3
    assert config.objective.eps_low == 0.2  # as registered
    assert of("--config.objective.eps_high=0.3", "--config.objective.name=dapo").objective == config.objective


# what the protocol of an objective asks of the rest of the config
ALONE = {"spo_single_stream": ["--config.rollout.responses=1"], "nash_mp": ["--config.steps=8"]}
# Units of other answers than a judge makes of samples come from data.
UNITS = ("hypo", "mapl", "opa_dpo", "rationale_dpo", "rationale_orpo", "srpo")
ALONE |= {name: ["--config.data.name=task"] for name in UNITS}
ALONE["preference_orchestrator"] = ["--config.data.name=task", "--config.heads.gate=2"]
ALONE["on_policy_distillation"] = ["--config.objective.mode=sequence"]  # the others need a teacher
ALONE["fapo"] = ["--config.protocol.genrm=tests.protocols.test_hints:finds_flaws"]
ALONE["themis"] = ["--config.data.name=task"]  # answers and tool calls


@pytest.mark.parametrize("name", names())
def test_every_registered_objective_can_be_named(name):
    run = resolved(f"--config.objective.name={name}", *ALONE.get(name, ()))
    assert set(run.config.objective) == {"name", *entry(name).parameters}
    assert run.objective._fields == make("reinforce")._fields


def test_another_name_drops_the_fields_of_the_old_one():
    assert "beta" in of().objective and "beta" in of(file=QUICKSTART).objective
    for file in (FILE, QUICKSTART):
        config = of("--config.objective.name=dr_grpo", file=file)
        assert "beta" not in config.objective and "agg" not in config.objective and config.objective.eps_high == 0.2
    with pytest.raises(ValueError, match="unknown field of config.objective 'beta'"):
        of("--config.objective.name=dr_grpo", "--config.objective.beta=0.1")


def test_the_same_name_keeps_the_files_fields():
    assert of("--config.objective.name=grpo", file=QUICKSTART).objective.eps_high == 0.28


def test_names_of_tasks_optimizers_schedules_and_tokenizers():
    config = of(
        "--config.optimizer.name=sgd",
        "--config.optimizer.momentum=0.9",
        "--config.optimizer.schedule.name=cosine",
        "--config.optimizer.schedule.end_share=0.5",
        "--config.warm_start.optimizer.name=lion",
    )
    assert config.optimizer.momentum == 0.9 and "b1" not in config.optimizer and config.optimizer.learning_rate == 1e-3
    assert config.optimizer.schedule.to_dict() == {"name": "cosine", "warmup_steps": 0, "end_share": 0.5}
    assert config.warm_start.optimizer.b2 == 0.99  # lion's own
    config = of(
        "--config.tokenizer.name=characters",
        "--config.task.name=jsonl",
        "--config.task.path=x",
        "--config.task.test_size=3",
    )
    assert set(config.tokenizer) == {"name"} and config.task.reward == "exact" and "digits" not in config.task


@pytest.mark.parametrize(
    ("flags", "expected"),
    (
        (["--config.objective.name=dr_grpo"], {"L_const": 3.0}),
        (["--config.objective.name=dr_grpo", "--config.sampling.max_new_tokens=20"], {"L_const": 20.0}),
        (
            ["--config.sampling.max_new_tokens=20", "--config.objective.name=dr_grpo", "--config.objective.L_const=7"],
            {"L_const": 7.0},
        ),
        (["--config.objective.name=dapo", "--config.sampling.max_new_tokens=20"], {"max_len": 20, "buffer": 4}),
        (["--config.objective.name=dapo", "--config.objective.buffer=2"], {"max_len": 3, "buffer": 2}),
        (["--config.objective.name=dapo"], {"max_len": 3, "buffer": 1}),
    ),
)
def test_hyperparameters_that_follow_the_generation_budget(flags, expected):
    objective = of(*flags).objective
    assert {name: objective[name] for name in expected} == expected
    assert all(type(objective[name]) is type(value) for name, value in expected.items())


def test_the_budget_of_a_config_file(tmp_path):
    """The file's own budget counts, and flags come after it."""
    file = tmp_path / "c.py"
    source = """
from tests.runs import tiny

def get_config():
    config = tiny.config({"objective": {"name": "dr_grpo"}})
    config.sampling.max_new_tokens = 17
    return config
"""
    file.write_text(source)
    assert of(file=f"--config={file}").objective.L_const == 17
    assert of("--config.sampling.max_new_tokens=9", file=f"--config={file}").objective.L_const == 9


@pytest.mark.parametrize(
    ("flag", "value"),
    (
        ("sampling.top_k=5", 5),
        ("sampling.top_p=0.9", 0.9),
        ("sampling.min_p=0.1", 0.1),
        ("objective.eps=0.1", 0.1),
        ("objective.dual_clip=3", 3.0),
        ("policy.kv_heads=2", 2),
        ("policy.head_dim=6", 6),
        ("policy.mlp_width=24", 24),
        ("optimizer.clip_norm=1", 1.0),
        ("rollout.prompt_width=9", 9),
        ("init_from=runs/a", "runs/a"),
        ("logging.wandb_project=p", "p"),
        ("compilation_cache=c", "c"),
        ("optimizer.eps=1e-6", 1e-6),
    ),
)
def test_optional_fields_are_none_or_typed(flag, value):
    path = flag.split("=")[0]
    config = of(f"--config.{flag}")
    found = block_of(config, path)
    assert found == value and type(found) is type(value)
    if path != "optimizer.eps":
        assert block_of(of(), path) is None


@pytest.mark.parametrize(
    ("flag", "value"),
    (
        ("sampling.stop=('a','bc')", ("a", "bc")),
        ("evaluation.pass_at=(1,2)", (1, 2)),
        ("evaluation.pass_at=()", ()),
        ("policy.remat=full", "full"),
        ("policy.scan_layers=false", False),
        ("logging.tensorboard=True", True),
        ("optimizer.learning_rate=1", 1.0),
        ("seed=3", 3),
        ("task.partial_credit=true", True),
    ),
)
def test_values_of_flags(flag, value):
    found = block_of(of(f"--config.{flag}"), flag.split("=")[0])
    assert found == value and type(found) is type(value)


def test_other_flags():
    extra = dict(workdir=("", "where"), resume=(False, "go on"), n=(1, "number"), rate=(0.5, "share"))
    assert parse([FILE], **extra)[1] == {"workdir": "", "resume": False, "n": 1, "rate": 0.5}
    assert parse([FILE, "--workdir=a=b", "--resume", "--n=3", "--rate=1"], **extra)[1] == {
        "workdir": "a=b",
        "resume": True,
        "n": 3,
        "rate": 1.0,
    }
    assert parse([FILE, "--noresume"], **extra)[1]["resume"] is False
    assert parse(["--n=2"], config_required=False, **extra)[0] is None


def test_help_is_standard_output_and_no_error(capsys):
    extra = dict(workdir=("", "where (required)"), resume=(False, "go on"), n=(1, "number"))
    for asked in ("--help", "-h"):
        with pytest.raises(SystemExit) as ended:
            parse([asked], about="Train.\n\n    an example", **extra)
        out, err = capsys.readouterr()
        assert ended.value.code == 0 and not err
        assert out.startswith("Train.") and "    an example" in out and "--config.FIELD=VALUE" in out
        assert "--workdir=VALUE: where (required)\n" in out and "--resume: go on (default: False)" in out
        assert "--n=VALUE: number (default: 1)" in out
    with pytest.raises(SystemExit) as ended:
        parse([FILE, "--help"], **extra)
    assert ended.value.code == 0 and "--config.objective.name=" in capsys.readouterr().out
    with pytest.raises(ValueError, match="unknown config file"):
        parse(["--config=nowhere.py", "--help"], **extra)


def test_the_error_of_a_flag_shows_no_tuple():
    with pytest.raises(ValueError, match=r"^flag --resume=perhaps: Non-boolean argument to boolean flag$"):
        parse([FILE, "--resume=perhaps"], resume=(False, "go on"))


def test_the_home_folder_is_expanded_wherever_a_path_is_taken(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    changes = ("init_from", "checkpoint.directory", "compilation_cache", "references.teacher")
    given = [FILE, "--workdir=~/runs/a", *[f"--config.{path}=~/{path}" for path in changes]]
    config, flags = parse(given, workdir=("", "where"))
    assert flags == {"workdir": f"{tmp_path}/runs/a"}
    assert [block_of(config, path) for path in changes] == [f"{tmp_path}/{path}" for path in changes]
    config.soup.of = ("~/a", "b")
    assert expand_paths(config).soup.of == (f"{tmp_path}/a", "b")
    with pytest.raises(ValueError, match="~nobody-of-this-name/a: there is no home folder of nobody-of-this-name"):
        parse([FILE, "--workdir=~nobody-of-this-name/a"], workdir=("", "where"))


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    (
        (["--config.objective.name=grppo"], "unknown objective 'grppo': did you mean 'grpo'"),
        (
            ["--config.objective.name=dapo", "--config.objective.eps_hihg=0.3"],
            "unknown field of config.objective 'eps_hihg': did you mean 'eps_high'",
        ),
        (["--config.rollout.promts=4"], "unknown field of config.rollout 'promts': did you mean 'prompts'"),
        (["--config.rolout.prompts=4"], "unknown field of config 'rolout': did you mean 'rollout'"),
        (["--config.rollout.prompts.x=4"], "unknown field of config.rollout.prompts 'x'"),
        (["--config.optimizer.name=adamm"], "unknown optimizer 'adamm': did you mean 'adam'"),
        (
            ["--config.optimizer.weight_dekay=0.1"],
            "unknown field of config.optimizer 'weight_dekay': did you mean 'weight_decay'",
        ),
        (["--config.optimizer.schedule.name=cosin"], "unknown schedule 'cosin': did you mean 'cosine'"),
        (
            ["--config.optimizer.schedule.warmup=3"],
            "unknown field of config.optimizer.schedule 'warmup': did you mean 'warmup_steps'",
        ),
        (["--config.warm_start.optimizer.name=addam"], "unknown optimizer 'addam': did you mean 'adam'"),
        (["--config.task.name=toyy"], "unknown task 'toyy': did you mean 'toy'"),
        (["--config.task.digit=3"], "unknown field of config.task 'digit': did you mean 'digits'"),
        (["--config.tokenizer.name=character"], "unknown tokenizer 'character': did you mean 'characters'"),
        (["--config.tokenizer.bas=3"], "unknown field of config.tokenizer 'bas': did you mean 'base'"),
        (["--config.policy.widht=32"], "unknown field of config.policy 'widht': did you mean 'width'"),
        (["--config.mesh.dat=2"], "unknown field of config.mesh 'dat': did you mean 'data'"),
        (["--workdri=x"], "unknown flag '--workdri': did you mean '--workdir'"),
        (["--confg.seed=1"], "unknown flag '--confg.seed'"),
        (["workdir"], "unexpected argument 'workdir': flags are written --name=value"),
        (["--config.rollout.prompts=four"], "config.rollout.prompts.*'four'"),
        (["--config.rollout.prompts=1.5"], "config.rollout.prompts.*'1.5'"),
        (["--config.rollout=4"], "config.rollout"),
        (["--config.seed"], "config.seed"),
    ),
)
def test_what_is_misspelt_fails_with_the_nearest(flags, message):
    with pytest.raises(ValueError, match=message) as error:
        parse([FILE, *flags], workdir=("", "where"))
    assert "\n" not in str(error.value)


def test_a_misspelt_field_of_a_config_file():
    with pytest.raises(ValueError, match="unknown field of config.objective .grpo. 'epsilon': did you mean .*'eps'"):
        fill(tiny.config({"objective": {"name": "grpo", "epsilon": 0.1}}))
    with pytest.raises(ValueError, match="unknown objective 'gropo': did you mean 'grpo'"):
        fill(tiny.config({"objective": {"name": "gropo"}}))


@pytest.mark.parametrize(
    ("path", "nearest"),
    (
        ("rollout.promts", "prompts"),
        ("policy.widht", "width"),
        ("sampling.topk", "top_k"),
        ("stepss", "steps"),
        ("warm_start.stepps", "steps"),
    ),
)
def test_a_misspelt_plain_field_of_a_config_file(path, nearest):
    """``config.rollout.promts = 4`` in ``get_config()`` must not be ignored."""
    with pytest.raises(
        ValueError, match=f"unknown field of config.*'{path.split('.')[-1]}': did you mean .*'{nearest}'"
    ):
        resolve(tiny.config({path: 3}), 1)


def test_config_files(tmp_path):
    (tmp_path / "right.py").write_text("def get_config(): ...")
    (tmp_path / "wrong.py").write_text("config = 3")
    for flag, message in (
        (f"--config={tmp_path}/rigth.py", "unknown config file '.*rigth.py': did you mean '.*right.py'"),
        (f"--config={tmp_path}/wrong.py", r"wrong.py has no function get_config\(\)"),
        ("--workdir=x", "--config=FILE is required"),
        ("--config.seed=3", "--config=FILE is required"),
    ):
        with pytest.raises(ValueError, match=message):
            parse([flag], workdir=("", "where"))


@pytest.mark.parametrize(
    ("flags", "devices", "message"),
    (
        (["--config.checkpoint.keep_best=eval/gredy"], 1, "keep_best 'eval/gredy': did you mean 'eval/greedy'"),
        (
            ["--config.checkpoint.keep_best=eval/reward", "--config.checkpoint.every=3"],
            1,
            "config.checkpoint.every 3 must be a multiple of config.evaluation.every 2, or a checkpoint would have no "
            "eval/reward",
        ),
        (
            ["--config.training.minibatches=3"],
            1,
            "config.training.minibatches 3 does not divide config.rollout.prompts 8: choose one of 1, 2, 4, 8",
        ),
        (
            ["--config.training.microbatches=3"],
            1,
            "config.training.microbatches 3 does not divide the 16 rows of a minibatch.*choose one of 1, 2, 4, 8, 16",
        ),
        (
            ["--config.rollout.prompts=6"],
            4,
            r"config.rollout.prompts 6 does not divide over mesh.data \* mesh.fsdp = 4",
        ),
        (
            ["--config.training.microbatches=8"],
            8,
            "the 2 rows of a microbatch do not divide over mesh.*config.training.microbatches",
        ),
        (
            ["--config.warm_start.batch=12"],
            8,
            r"config.warm_start.batch 12 does not divide into .*mesh.data \* mesh.fsdp \* mesh.expert = 8",
        ),
        (["--config.mesh.data=3"], 8, "mesh .*'data': 3.* does not fit 8 devices"),
        (["--config.mesh.fsdp=-1"], 8, "only one axis of the mesh may be -1"),
        (["--config.mesh.tensor=0"], 8, "mesh.tensor must be -1 .* or at least 1, not 0"),
        (["--config.mesh.tensor=4"], 4, "config.mesh.tensor 4 does not divide config.policy.heads 2"),
        (
            ["--config.mesh.fsdp=8", "--config.policy.width=20"],
            8,
            "config.mesh.fsdp 8 does not divide config.policy.width 20",
        ),
        (
            ["--config.mesh.tensor=2", "--config.policy.kv_heads=1"],
            2,
            "config.mesh.tensor 2 does not divide config.policy.kv_heads 1",
        ),
        (
            ["--config.mesh.context=4", "--config.rollout.prompts=12"],
            8,
            r"config.rollout.prompts 12 does not divide over .* \* mesh.context = 8: choose 16, or a smaller axis",
        ),
        (["--config.mesh.expert=2"], 2, "config.mesh.expert 2 has no effect: config.policy has no experts"),
        (
            ["--config.mesh.expert=4", "--config.policy.experts=6", "--config.policy.experts_per_token=2"],
            4,
            "config.mesh.expert 4 does not divide config.policy.experts 6: choose one of 1, 2, 3, 6",
        ),
    ),
)
def test_what_does_not_divide(flags, devices, message):
    with pytest.raises(ValueError, match=message) as error:
        resolve(parse([FILE, *flags])[0], devices)
    assert "\n" not in str(error.value)


def test_microbatches_may_not_cut_groups_that_an_objective_sees_whole():
    config, objective = tiny.config({"training.microbatches": 8}), make("reinforce")
    resolve(config, 1, objective=objective)
    with pytest.raises(ValueError, match="config.training.microbatches 8 would cut groups .*: choose one of 1, 2, 4"):
        resolve(config, 1, objective=objective._replace(unit=Unit(coupling="group")))


COUNTS = (
    "rollout.prompts",
    "rollout.responses",
    "training.epochs",
    "training.minibatches",
    "training.microbatches",
    "evaluation.every",
    "evaluation.prompts",
    "evaluation.samples",
    "checkpoint.every",
    "checkpoint.keep",
    "warm_start.batch",
    "warm_start.microbatches",
    "sampling.max_new_tokens",
    "nonfinite_patience",
)


@pytest.mark.parametrize("path", COUNTS)
def test_counts_are_at_least_1(path):
    for value in (0, -1):
        with pytest.raises(ValueError, match=f"config.{path} must be a whole number of at least 1, not {value}"):
            of(f"--config.{path}={value}")


@pytest.mark.parametrize(
    ("flag", "message"),
    (
        ("steps=-1", "config.steps must be a whole number of at least 0, not -1"),
        ("warm_start.steps=-1", "config.warm_start.steps must be a whole number of at least 0, not -1"),
        ("warm_start.drop_last=1.5", r"config.warm_start.drop_last must be a number in \[0, 1\], not 1.5"),
        ("sampling.temperature=0.0", "sampling.temperature must be a positive number, not 0.0"),
        ("sampling.top_k=0", "sampling.top_k must be a whole number of at least 1 or None, not 0"),
        ("sampling.top_p=1.5", r"sampling.top_p must be a number in \(0, 1\] or None"),
        ("policy.kv_heads=3", "policy.kv_heads 3 does not divide policy.heads 2"),
        ("policy.dtype=float16", "policy.dtype must be float32 or bfloat16, not 'float16'"),
        ("evaluation.samples=2", "config.evaluation.pass_at asks for pass@4.*config.evaluation.samples is 2"),
        ("objective.agg=seq_men", "unknown aggregation 'seq_men': did you mean 'seq_mean'"),
        ("objective.agg=seq_sum_const", "L_const"),
        ("optimizer.learning_rate=0.0", "optimizer.learning_rate must be a positive number"),
        # What would only be found after the warm start, or never.
        ("objective.scale=grup", "scale.*'grup'"),
        ("objective.singleton=zer", "singleton.*'zer'"),
        ("policy_temperature=0.0", "config.policy_temperature"),
        ("policy_temperature=-1.0", "config.policy_temperature"),
        ("evaluation.pass_at=(0,1)", "config.evaluation.pass_at"),
        ("seed=-1", "config.seed"),
        ("logging.samples=-1", "config.logging.samples"),
        ("optimizer.clip_norm=-1.0", "optimizer.clip_norm"),
        ("optimizer.schedule.warmup_steps=-1", "warmup_steps"),
    ),
)
def test_values_out_of_range_are_named(flag, message):
    with pytest.raises(ValueError, match=message) as error:
        of(f"--config.{flag}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags",
    (
        ["--config.training.minibatches=3"],
        ["--config.training.microbatches=3"],
        ["--config.objective.eps=0.1", "--config.objective.eps_low=0.1"],
        ["--config.sampling.temperature=-1.0"],
        ["--config.steps=-1"],
    ),
)
def test_nothing_is_compiled_or_written_for_a_config_that_cannot_run(tmp_path, flags):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "compile" in name else None
    )
    config = parse([FILE, *flags])[0]
    with pytest.raises(ValueError):
        train_rl(config, str(tmp_path / "run"))
    assert not compiled and not (tmp_path / "run").exists()


# ---- what is valid can be run and kept -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_config_of_every_optimizer_can_be_written(tmp_path, name):
    config = of(f"--config.optimizer.name={name}", f"--config.warm_start.optimizer.name={name}")
    run = RunDirectory(tmp_path / "run")
    try:
        run.save_json("config.json", config.to_dict())
    finally:
        run.close()


def test_a_block_without_a_name():
    data = ("--config.data.name=jsonl", "--config.data.path=pairs.jsonl", "--config.objective.name=dpo")
    run = resolved("--config.task.name=None", "--config.protocol.name=None", *data)
    config = run.config
    assert config.task.to_dict() == {"name": None} and config.protocol.name is None and config.data.path
    assert run.protocol_name == "preference_data"
    with pytest.raises(ValueError, match="config.task.name is None"):
        of("--config.task.name=None")


def test_combinations_of_names_are_valid():
    pairs = list(itertools.product(("adamw", "sgd"), SCHEDULES))
    for objective, (optimizer, schedule) in zip(names(), itertools.cycle(pairs)):  # noqa: B905 (cycle never ends)
        of(
            f"--config.objective.name={objective}",
            f"--config.optimizer.name={optimizer}",
            f"--config.optimizer.schedule.name={schedule}",
            *ALONE.get(objective, ()),
        )


@pytest.mark.parametrize(
    ("objective", "sizes", "found"),
    [
        ("grpo", {}, {}),
        ("bradley_terry_rm", {}, {"score": ()}),
        ("gpm_rm", {}, {"embed": (8,), "gate": (4,)}),
        ("gpm_rm", {"embed": 4}, {"embed": (4,), "gate": (2,)}),
        ("preference_orchestrator", {"gate": 3}, {"gate": (3,)}),
        ("bradley_terry_rm", {"embed": 4}, "config.heads.embed is 4, but the objective asks for no embed head"),
        ("gpm_rm", {"embed": 5}, "config.heads.embed must be an even number of at least 2, not 5"),
        ("gpm_rm", {"embed": 0}, "config.heads.embed must be an even number of at least 2, not 0"),
        ("gpm_rm", {"gate": 3}, "config.heads.gate is 3, but there is one for each two of config.heads.embed 8"),
        ("preference_orchestrator", {}, "config.heads.gate is required: the number of reward models"),
    ],
)
def test_sizes_of_heads(objective, sizes, found):
    given = default().heads
    given.update(sizes)
    if isinstance(found, str):
        with pytest.raises(ValueError, match=found):
            heads_of(make(objective), given)
    else:
        assert heads_of(make(objective), given) == found


@pytest.mark.parametrize(
    ("name", "refused"), [("grpo", True), ("dr_grpo", True), ("gspo", True), ("rloo", True), ("reinforce", False)]
)
def test_objectives_that_compare_answers_refuse_groups_of_one(name, refused):
    config = default()
    config.objective = ConfigDict(dict(name=name))
    config.rollout.responses = 1
    if not refused:
        assert resolve(config, 1).objective.asks.responses == 1
        return
    with pytest.raises(ValueError, match=f"config.rollout.responses must be at least 2, not 1: objective '{name}'"):
        resolve(config, 1)
    config.objective = ConfigDict(dict(name=name, singleton="raw"))
    resolve(config, 1)


def test_the_trainer_scores_at_the_temperature_of_sampling_unless_it_has_its_own():
    for given, own, expected in ((0.7, None, 0.7), (0.7, 0.9, 0.9), (1.0, None, 1.0)):
        config = default()
        config.sampling.temperature = given
        if own is not None:
            config.policy_temperature = own
        assert resolve(config, 1).config.policy_temperature == expected


def test_sppo_renews_its_reference_unless_told_otherwise():
    def keeps(*flags):
        return resolved("--config.objective.name=sppo", *flags).protocol.facts.references

    assert keeps() == {"ref": {"every": 1}}
    assert keeps("--config.protocol.name=judged", "--config.protocol.ref_every=5") == {"ref": {"every": 5}}
    with pytest.raises(ValueError, match="sppo renews its reference during the run"):
        keeps("--config.training.offload_reference=True")


def test_rso_samples_from_a_reference_that_is_there():
    flags = "--config.objective.name=rso", "--config.protocol.name=rso", "--config.protocol.n=2"
    assert resolved(*flags).protocol.facts.references == {"ref": {}}
    with pytest.raises(ValueError, match="candidates of protocol 'rso' are sampled from it"):
        resolved(*flags, "--config.training.offload_reference=True")
    assert resolved(*flags, "--config.objective.name=simpo").protocol.facts.references == {"ref": {}}
