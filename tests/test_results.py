"""The table on disk: what it holds, refuses, survives (processes really killed), and how several processes share it."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from tensorlens_utils import results
from tensorlens_utils.results import Job, fill, read

# A run of 12 jobs of 2 rows, which notes in a log of its own what it began and what it did.
SCRIPT = """
import os, sys, time
from tensorlens_utils.results import Job, fill

path, log, seconds, hang = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])

def note(text):
    with open(log, "a") as stream:
        stream.write(text + chr(10))

def run(n):
    note(f"begin {n}")
    time.sleep(3600 if n == hang else seconds)
    note(f"end {n}")
    return [{"n": n, "half": half, "value": (2 * n + half) / 7} for half in (1, 0)]

jobs = [Job([(n, 0), (n, 1)], lambda n=n: run(n)) for n in range(12)]
print(len(fill(path, jobs, key=["n", "half"], settings={"by": 7}).rows))
"""


def start(folder, name="log", seconds=0.02, hang=-1, command=(sys.executable, "-c", SCRIPT)):
    arguments = [folder / "table.jsonl", folder / name, str(seconds), str(hang)]
    return subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True)


def log(folder, *names, what="end"):
    lines = [line for name in names for line in (folder / name).read_text().splitlines()]
    return sorted(int(line.split()[1]) for line in lines if line.startswith(what))


def until(condition):
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def rows_on(path):
    return path.read_bytes().count(b"\n") - 1 if path.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start(folder).communicate()[0] == "24\n"
    assert log(folder, "log") == [*range(12)]
    return folder / "table.jsonl"


def jobs(ns, done=None, value=lambda n: n / 3):
    def run(n):
        if done is not None:
            done.append(n)
        return [{"n": n, "value": value(n)}]
    return [Job([(n,)], lambda n=n: run(n)) for n in ns]


def simple(path, ns=range(3), settings=None, **options):
    return fill(path, jobs(ns, **options), key=["n"], settings=settings or {})


# --------------------------------------------------------------------------------------------------------- one process


def test_a_table_is_read_as_it_was_filled(tmp_path):
    path = tmp_path / "new" / "table.jsonl"
    table = fill(path, jobs([2, 0, 1], value=lambda n: np.arange(n)), key=["n"], settings={"sizes": (1, 2)})
    assert table == read(path) and table.settings == {"sizes": [1, 2]} and table.key == ("n",)
    assert table.rows == [{"n": 0, "value": []}, {"n": 1, "value": [0]}, {"n": 2, "value": [0, 1]}]
    assert table.where(n=2) == [{"n": 2, "value": [0, 1]}]
    assert [p.name for p in path.parent.iterdir()] == ["table.jsonl"]
    assert fill(None, jobs(range(2)), key=["n"], settings={}).rows == simple(tmp_path / "t", range(2)).rows


def test_what_is_there_is_not_done_again_and_more_may_be_asked(tmp_path):
    path, done = tmp_path / "table.jsonl", []
    simple(path, range(3), done=done)
    before = path.read_bytes()
    assert len(simple(path, range(3), done=done).rows) == 3 and path.read_bytes() == before
    assert [row["n"] for row in simple(path, range(1, 5), done=done).rows] == [1, 2, 3, 4]
    assert done == [0, 1, 2, 3, 4] and len(read(path).rows) == 5


def test_an_error_keeps_the_rows_before_it(tmp_path):
    path, done = tmp_path / "table.jsonl", []
    with pytest.raises(ZeroDivisionError):
        simple(path, [3, 2, 1, 0], value=lambda n: 1 / n)
    assert [row["n"] for row in read(path).rows] == [1, 2, 3]
    simple(path, [3, 2, 1, 0], done=done)
    assert done == [0]


def test_progress_is_a_line_now_and_then(tmp_path, capsys, monkeypatch):
    simple(tmp_path / "quick.jsonl")
    assert capsys.readouterr().out == ""  # work of a moment shows none
    monkeypatch.setattr(results, "EVERY", -1)
    simple(tmp_path / "squares.jsonl", range(2))
    assert capsys.readouterr().out.splitlines()[0].split()[:5] == ["squares", "1", "of", "2", "rows"]
    fill(tmp_path / "silent.jsonl", jobs(range(2)), key=["n"], settings={}, progress=False)
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_table_made_with_other_settings_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "table.jsonl"
    simple(path, settings={"model": "a", "steps": 3})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"rows of one setting.*table.jsonl.*model was 'a', now is 'b'.*another path"):
        simple(path, settings={"model": "b", "steps": 3})
    with pytest.raises(ValueError, match="seed was None, now is 1"):
        simple(path, settings={"model": "a", "steps": 3, "seed": 1})
    with pytest.raises(ValueError, match=r"key was \['n'\], now is \['m'\]"):
        fill(path, [], key=["m"], settings={"model": "a", "steps": 3})
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["a note\n", '{"n": 1}\n', "[]\n", "a note"])
def test_a_file_that_is_no_table_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    for call in (lambda: simple(path), lambda: read(path)):
        with pytest.raises(ValueError, match="first line holds its key and settings.*a new file"):
            call()
    assert path.read_text() == text
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing.jsonl")


@pytest.mark.parametrize("rows", [[], [{"n": 0}, {"n": 0}], [{"n": 1}], [{"n": 0}, {"n": 1}], [{"m": 0}]])
def test_a_job_must_make_the_rows_it_announced(tmp_path, rows):
    with pytest.raises(ValueError, match="one row for each of its keys"):
        fill(tmp_path / "table.jsonl", [Job([(0,)], lambda: rows)], key=["n"], settings={})
    assert read(tmp_path / "table.jsonl").rows == []


def test_nan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        simple(tmp_path / "table.jsonl", value=lambda n: float("nan"))


# ------------------------------------------------------------------------------------------------- killed and started


@pytest.mark.parametrize("when", [1, 7, 16])
def test_killed_half_way_and_started_again_it_gives_the_same_table_and_does_nothing_twice(tmp_path, undisturbed, when):
    path, run = tmp_path / "table.jsonl", start(tmp_path)
    until(lambda: rows_on(path) >= when)
    run.kill()
    assert run.wait() == -9
    had = rows_on(path)
    assert when <= had < 24
    assert start(tmp_path, "again").communicate()[0] == "24\n"
    assert path.read_bytes() == undisturbed.read_bytes()
    kept = [n for n in range(12) if 2 * n + 1 < had]  # the jobs whose rows were in the file
    assert log(tmp_path, "again", what="begin") == [n for n in range(12) if n not in kept]


@pytest.mark.parametrize("lost", [1, 5, 60, 200])
def test_a_file_cut_off_anywhere_is_gone_on_with(tmp_path, undisturbed, lost):
    path, whole = tmp_path / "table.jsonl", undisturbed.read_bytes()
    path.write_bytes(whole[:-lost])
    complete = whole[:-lost].count(b"\n") - 1
    assert len(read(path).rows) == complete
    assert start(tmp_path).communicate()[0] == "24\n"
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines()) and read(path) == read(undisturbed)
    assert log(tmp_path, "log") == [*range(complete // 2, 12)]


def test_what_was_cut_off_leaves_nothing_behind_even_where_it_was_longer(tmp_path):
    path, other = tmp_path / "table.jsonl", tmp_path / "other.jsonl"
    simple(path, range(2))
    with path.open("a") as stream:
        stream.write('{"n": 2, "value": "' + 1000 * "x")
    simple(path)
    simple(other)
    assert path.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("size", [0, 1, 20])
def test_a_file_cut_off_in_its_first_line_is_begun_again(tmp_path, undisturbed, size):
    path = tmp_path / "table.jsonl"
    path.write_bytes(undisturbed.read_bytes()[:size])
    assert start(tmp_path).communicate()[0] == "24\n"
    assert path.read_bytes() == undisturbed.read_bytes()


# --------------------------------------------------------------------------------------------------- several processes


def test_several_processes_fill_one_table_and_do_nothing_twice(tmp_path, undisturbed):
    runs = [start(tmp_path, name, seconds=0.1) for name in ("a", "b", "c")]
    assert [run.communicate()[0] for run in runs] == ["24\n"] * 3  # each has the whole table in the end
    assert read(tmp_path / "table.jsonl") == read(undisturbed)
    assert len((tmp_path / "table.jsonl").read_text().splitlines()) == 25
    assert log(tmp_path, "a", "b", "c", what="begin") == [*range(12)]
    shares = [len(log(tmp_path, name)) for name in ("a", "b", "c") if (tmp_path / name).exists()]
    assert len(shares) > 1, shares
    assert not (tmp_path / "table.jsonl.claims").exists()


def test_the_job_of_a_process_that_dies_is_taken_over_and_not_before(tmp_path, undisturbed):
    dying = start(tmp_path, "dying", hang=2)
    until(lambda: (tmp_path / "dying").exists() and "begin 2" in (tmp_path / "dying").read_text())
    other = start(tmp_path, "other")
    until(lambda: rows_on(tmp_path / "table.jsonl") == 22)  # all but the job that hangs
    time.sleep(0.3)
    assert other.poll() is None and 2 not in log(tmp_path, "other", what="begin")
    dying.kill()
    dying.wait()
    assert other.communicate()[0] == "24\n"
    assert log(tmp_path, "other", what="begin") == [*range(2, 12)]
    assert read(tmp_path / "table.jsonl") == read(undisturbed)


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers_start_processes_that_share_a_table(tmp_path, undisturbed, launcher):
    # `accelerate launch` hands several GPUs to torchrun; for several processes without one it has debug_launcher.
    script, body = tmp_path / "script.py", SCRIPT.replace("sys.argv[2]", "sys.argv[2] + str(os.getpid())")
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script)
    if launcher == "accelerate":
        pytest.importorskip("accelerate")
        command = (sys.executable, script)
        body = "import accelerate\ndef main():" + body.replace("\n", "\n    ")
        body += "\naccelerate.debug_launcher(main, (), 2)\n"
    script.write_text(body)
    run = start(tmp_path, seconds=0.3, command=command)
    assert run.communicate()[0].count("24") == 2 and run.returncode == 0
    logs = [path.name for path in tmp_path.glob("log*")]
    assert len(logs) == 2 and log(tmp_path, *logs, what="begin") == [*range(12)]
    assert read(tmp_path / "table.jsonl") == read(undisturbed)


def test_rows_are_on_the_disk_before_the_next_job_begins(tmp_path):
    path = tmp_path / "table.jsonl"

    def run(n):
        assert rows_on(path) == n
        return [{"n": n}]

    fill(path, [Job([(n,)], lambda n=n: run(n)) for n in range(4)], key=["n"], settings={})
    assert json.loads(path.read_text().splitlines()[0]) == {"key": ["n"], "settings": {}}
    assert os.listdir(tmp_path) == ["table.jsonl"]
