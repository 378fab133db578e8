"""One writer for a folder; stale locks are recognized; readers do not ask."""

import json
import os
import re
import subprocess
import sys

import pytest

from jaxpo.storage import lock
from jaxpo.storage.rundir import RunDirectory, read_metrics


def test_a_second_writer_is_refused_in_one_line_and_a_reader_is_not(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.write(1, {"loss": 0.5})
    for resume in (None, 1):
        with pytest.raises(
            lock.Locked, match=rf"run is in use: process {os.getpid()} on .*; wait for it, stop it"
        ) as error:
            RunDirectory(tmp_path / "run", resume_step=resume)
        assert "\n" not in str(error.value)
    assert read_metrics(tmp_path / "run")["loss"].tolist() == [0.5]
    run.close()
    RunDirectory(tmp_path / "run", resume_step=1).close()
    assert not list((tmp_path / "run").glob(f"{lock.NAME}*"))


def test_a_run_that_cannot_be_opened_leaves_no_lock(tmp_path, monkeypatch):
    class Refuses:
        @staticmethod
        def init(**_):
            raise RuntimeError("no\nnetwork")

    monkeypatch.setitem(sys.modules, "wandb", Refuses)
    with pytest.raises(OSError, match="wandb did not start: RuntimeError: no network; log in, set WANDB_MODE=offline"):
        RunDirectory(tmp_path / "run", wandb={"project": "p"})
    assert not (tmp_path / "run" / lock.NAME).exists()


def leave(folder, **changes):
    (folder / lock.NAME).write_text(json.dumps({**lock.me(), **changes}))


def test_the_lock_of_a_process_that_is_gone_is_taken_over(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    leave(tmp_path, pid=gone.pid)
    lock.take(tmp_path)
    assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    lock.release(tmp_path)
    leave(tmp_path, start="another boot 1")  # the number is ours, but it was another process
    with lock.held(tmp_path), pytest.raises(lock.Locked):
        lock.check_free(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_process_that_lives_stays(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        leave(tmp_path, pid=other.pid, start=lock.started(other.pid))
        with pytest.raises(lock.Locked, match=f"process {other.pid}"):
            lock.take(tmp_path)
        lock.release(tmp_path)  # not ours
        assert (tmp_path / lock.NAME).exists()


@pytest.mark.parametrize("text", (None, "", "[]", '{"host": 1}', "\xff"))
def test_a_lock_of_another_host_or_without_sense_says_how_to_remove_it(tmp_path, text):
    leave(tmp_path, host="elsewhere") if text is None else (tmp_path / lock.NAME).write_text(text)
    with pytest.raises(lock.Locked, match=re.escape(f"rm '{tmp_path / lock.NAME}'")):
        lock.check_free(tmp_path)


def test_of_many_that_take_a_stale_lock_one_has_it(tmp_path):
    leave(tmp_path, start="another boot 1")
    code = (
        "import sys, time, pathlib; from jaxpo.storage import lock\n"
        "try: lock.take(pathlib.Path(sys.argv[1])); print('mine', flush=True); sys.stdin.read()\n"
        "except lock.Locked: print('refused', flush=True)"
    )
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    tried = [subprocess.Popen([sys.executable, "-c", code, tmp_path], env=environment, **pipes) for _ in range(3)]
    said = sorted(process.stdout.readline().strip() for process in tried)
    for process in tried:
        process.communicate()
    assert said == ["mine", "refused", "refused"]
