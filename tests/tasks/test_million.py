"""A million JSON lines: seconds and memory of a task's data, in a process of its own."""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, time
from jaxpo.tasks import build

def held():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

before, start = held(), time.process_time()
task = build(dict(name="jsonl", path=sys.argv[1], reward="numeric", test_size=100))
print(time.process_time() - start, held() - before, len(task.train))
"""


def loaded(path):
    """CPU-seconds, bytes, and items of a file."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, check=True)
    seconds, held, n = done.stdout.split()
    return float(seconds), int(held), int(n)


def written(path, n):
    with open(path, "w") as file:
        for i in range(n):
            question = (
                f"Person {i} has {i % 97} apples and buys {i % 89} more each day. How many are there after a week?"
            )
            answer = f"Each day brings {i % 89}, seven days bring {7 * (i % 89)}. #### {i % 97 + 7 * (i % 89)}"
            file.write(json.dumps({"question": question, "answer": answer}) + "\n")
    return path.stat().st_size


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_million_rows(tmp_path):
    """At most 15 s of a processor, and three times the file."""
    size = written(tmp_path / "rows.jsonl", 1_000_000)
    seconds, held, n = loaded(tmp_path / "rows.jsonl")
    print(f"{size >> 20} MB: {seconds:.1f} s, {held / size:.2f} times the file")
    assert n == 999_900 and seconds < 15 and held < 3 * size
