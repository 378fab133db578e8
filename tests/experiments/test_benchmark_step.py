"""The step benchmark's arithmetic, tables and errors, from canned records: no peer is needed."""

import json
import re
import sys

import pytest
from rich.console import Console

from experiments.benchmarks import record, step

RATE = {"gflop_per_s": 400.0, "gflop_per_cpu_s": 200.0, "loadavg": 0.5}


def canned(system: str, seconds: float, mib: float, vocab: int = 512) -> dict:
    """A record whose phases take `seconds` each (the step four times that), CPU-seconds twice the wall seconds."""
    phases = {
        name: {"cpu_s": 2 * seconds * times, "wall_s": seconds * times, "peak_mib": mib}
        for name, times in {"generate": 1, "reference": 1, "update": 2, "rest": 0, "step": 4}.items()
    }
    job = {"vocab": vocab}
    return {"system": system, "job": job, "gen_tokens": 4096.0, "phases": phases, "versions": {"python": "3.11"}}


def test_ratio_is_of_medians_and_to_the_better_peer_of_each_measure():
    records = [canned("jaxpo", s, 400.0) for s in (0.3, 0.2, 9.0)]  # median 0.3: one slow round does not matter
    records += [canned("trl", s, 1000.0) for s in (1.0, 1.2, 0.1)]
    records += [canned("tunix", s, 500.0) for s in (2.0, 2.0, 2.0)]
    summary = step.summarize(records, record.Job(), RATE)
    assert summary["cpu_s/step"]["median"] == pytest.approx({"jaxpo": 2.4, "trl": 8.0, "tunix": 16.0})
    assert summary["cpu_s/step"]["best_peer"] == "trl"
    assert summary["cpu_s/step"]["ratio"] == pytest.approx(0.3)
    assert summary["peak_mib/step"]["best_peer"] == "tunix"
    assert summary["peak_mib/step"]["ratio"] == pytest.approx(0.8)
    tokens = summary["tokens_per_cpu_s"]
    assert tokens["best_peer"] == "trl" and tokens["ratio"] == pytest.approx(1 / 0.3)  # more is better
    assert tokens["median"]["trl"] == pytest.approx(4096 / 2.0)


@pytest.mark.parametrize(
    "vocab, share, step_reached, tokens_reached",
    [(512, 0.5, True, True), (512, 0.6, False, True), (512, 0.7, False, False), (32768, 0.4, False, None)],
)
def test_bars(vocab, share, step_reached, tokens_reached):
    records = [canned("jaxpo", share, 10.0, vocab), canned("trl", 1.0, 10.0, vocab)]
    summary = step.summarize(records, record.Job(vocab=vocab), RATE)
    assert summary["cpu_s/step"]["reached"] is step_reached
    assert summary["tokens_per_cpu_s"]["reached"] is tokens_reached
    assert summary["peak_mib/step"]["reached"] is False  # 1.0 of the peer's, the bar is 0.5
    assert summary["wall_s/step"]["bar"] is None


def test_bars_are_for_the_default_shape_only():
    records = [canned("jaxpo", 0.1, 1.0), canned("trl", 1.0, 10.0)]
    assert step.summarize(records, record.Job(hidden=128), RATE)["cpu_s/step"]["reached"] is None
    assert step.summarize(records, record.Job(steps=9), RATE)["cpu_s/step"]["reached"] is True


def test_without_peers_there_are_floors_but_no_ratios():
    row = step.summarize([canned("jaxpo", 0.3, 1.0)], record.Job(), RATE)["cpu_s/step"]
    assert row["ratio"] is None and row["best_peer"] is None and row["reached"] is None
    assert row["floor"] == pytest.approx(step.operations(record.Job())["step"] / 200e9)


def test_operations_of_a_tiny_job_counted_by_hand():
    # 1 layer of width 64 (mlp 176): a token costs 2*(4*64*64 + 3*64*176) in the block and 2*64*8 in the head; it
    # attends to itself and all before it at 4*64 a position.
    job = record.Job(vocab=8, prompts=1, generations=2, prompt_len=2, new_tokens=2, hidden=64, layers=1)
    assert job.mlp == 176 and job.heads == 1
    block, head, attend = 2 * (4 * 64 * 64 + 3 * 64 * 176), 2 * 64 * 8, 4 * 64
    prefill = 2 * block + (1 + 2) * attend + head
    decode = 2 * (block + head + 3 * attend)  # the second token of both rows, read from position 3
    score = 2 * (3 * block + (1 + 2 + 3) * attend + 2 * head)
    assert step.operations(job) == pytest.approx(
        {"generate": prefill + decode, "reference": score, "update": 3 * score, "rest": 0,
         "step": prefill + decode + 4 * score}
    )  # fmt: skip


def test_tables_and_json():
    jobs = [record.Job(), record.Job(vocab=32768)]
    records = [
        canned(system, seconds, 100.0, job.vocab)
        for job in jobs
        for system, seconds in (("jaxpo", 0.3), ("trl", 1.0), ("tunix", 2.0))
    ]
    console = Console(width=160, record=True, quiet=False, file=open("/dev/null", "w"))
    with console.file:
        result = step.report(records, jobs, (RATE, {**RATE, "gflop_per_cpu_s": 100.0}), console)
    text = console.export_text()
    assert "vocabulary 512" in text and "vocabulary 32768" in text
    assert re.search(r"CPU-seconds: step\s.*2\.4\s.*8\s.*16\s.*0\.3 \(trl\).*≤ 0\.5 reached", text)
    assert re.search(r"generated tokens per CPU-second\s.*6827\s.*2048\s.*1024\s.*3\.33 \(trl\).*≥ 1\.5 reached", text)
    assert json.loads(json.dumps(result))["summary"]["32768"]["cpu_s/step"]["bar"] == 0.35
    # The floor takes the faster of the two rates.
    assert result["summary"][512]["cpu_s/step"]["floor"] == pytest.approx(step.operations(jobs[0])["step"] / 200e9)


def test_systems_are_interleaved(monkeypatch):
    order = []

    def run(system, python, job):
        order.append((system, job.vocab))
        return {**canned(system, 1.0, 1.0, job.vocab), "loadavg": [0.0, 0.0]}

    monkeypatch.setattr(step, "run_system", run)
    jobs = [record.Job(vocab=8), record.Job(vocab=16)]
    records = step.run_all({"jaxpo": "a", "trl": "b"}, jobs, 2, Console(quiet=True))
    assert order == [("jaxpo", 8), ("trl", 8), ("jaxpo", 16), ("trl", 16)] * 2
    assert [r["round"] for r in records] == [1] * 4 + [2] * 4


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--vs=tlr"], "unknown system 'tlr'; did you mean 'trl'?"),
        (["--vs=trl,trl"], "named twice"),
        (["--vs=", "--vocab=512,many"], "not a list of integers"),
        (["--vs=", "--hidden=100"], "hidden must be a multiple of the head size 64, got 100; try 128"),
        (["--vs=", "--generations=1"], "generations must be at least 2"),
        (["--vs=", "--steps=0"], "steps must be at least 1"),
        (["--vs=", "--rounds=0"], "--rounds must be at least 1"),
        (["--vs=", "--json=no/such/folder/x.json"], "--json: no folder"),
        (["--vs=tunix", "--python_trl=python"], "--python_trl has no effect: --vs does not name trl"),
        (["--vs=trl", "--python_trl=no-such-python"], "--python_trl: cannot run no-such-python"),
    ],
)
def test_bad_flags_end_with_one_line(flags, message, capsys):
    with pytest.raises(SystemExit):
        step.parse(flags)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_peer_that_is_not_installed_names_the_extra():
    with pytest.raises(ValueError, match=r"no_such_peer is not installed for .*\[bench\]"):
        step.check_installed("no_such_peer", sys.executable)


def test_empty_vs_is_jaxpo_alone():
    systems, jobs, _ = step.parse(["--vs=", "--vocab=512"])
    assert systems == {"jaxpo": sys.executable} and jobs == [record.Job()]


def test_recorder_adds_up(capsys):
    job = record.Job(steps=2, warmup=1)
    recorder = record.Recorder(every=0.001)
    for _ in range(3):
        for name in ("generate", "generate", "reference", "update"):
            with recorder.phase(name):
                sum(range(20_000))
        recorder.gen_tokens += 5
        recorder.end_step()
    recorder.print("jaxpo", job, ("numpy",), params=7)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["gen_tokens"] == 5 and printed["params"] == 7 and len(printed["step_wall_s"]) == 3
    assert set(printed["phases"]) == set(record.PHASES)
    assert step.measures(printed).keys() == step.measures(canned("jaxpo", 1.0, 1.0)).keys()
    assert 0 <= printed["phases"]["rest"]["wall_s"] < printed["phases"]["step"]["wall_s"]


def test_recorder_refuses_steps_without_all_phases():
    recorder = record.Recorder()
    recorder.start("generate")
    with pytest.raises(RuntimeError, match="still open"):
        recorder.start("update")
    recorder.stop()
    with pytest.raises(RuntimeError, match="needs the phases generate, reference and update"):
        recorder.end_step()


def test_prompts_are_the_same_for_all_and_never_padding():
    job = record.Job(vocab=8, steps=2)
    prompts = job.prompt_ids()
    assert prompts == job.prompt_ids() and len(prompts) == 3 and len(prompts[0]) == 8 and len(prompts[0][0]) == 32
    assert {i for rows in prompts for row in rows for i in row} == set(range(1, 8))
