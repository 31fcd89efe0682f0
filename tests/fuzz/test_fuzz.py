"""A fixed part of the fuzzing, and faults that are planted to see that each kind is found."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lepton.errors import InputError

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the bounds of a process are Linux's"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
if sys.platform.startswith("linux"):
    from tests.fuzz.confinement import Escaped
    from tests.fuzz.judge import LONGEST, problem_of_error, same
    from tests.fuzz.workers import Died, Limits, attempt, run_all

ROOT = Path(__file__).parents[2]
FILES, CALLS = 400, 350
"""Half a minute of one core. `python -m tests.fuzz --files 10000 --calls 3000 --jobs 2` is the long run."""


def test_damaged_files_and_hostile_calls():
    command = [sys.executable, "-m", "tests.fuzz", "--files", str(FILES), "--calls", str(CALLS), "--seed", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=900)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]


def _wait():
    reading, _writing = os.pipe()
    os.read(reading, 1)


PLANTED = {
    "good": lambda: 5,
    "refusal": lambda: _raise(InputError("depth=2: must lie in 0..1")),
    "error": lambda: {}["missing"],
    "beside Exception": lambda: _raise(BaseException("a panic")),
    "hang": lambda: [None for _ in iter(int, 1)],
    "wait": _wait,
    "memory": lambda: len(bytearray(1 << 34)),  # more than the process may have freed and kept
    "crash": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(3),
    "last": lambda: 6,
}


def _raise(error):
    raise error


def _work(case):
    value, error = attempt(PLANTED[case], Limits(cpu=0.2, wall=4.0, memory=1 << 28))
    problem = None if error is None else problem_of_error(error)
    return value if error is None else problem and problem.cause


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_kind_of_failure_is_a_finding_and_the_rest_goes_on(jobs):
    found = dict(run_all(list(PLANTED), _work, jobs=jobs, limits=Limits()))
    where = "outside lepton"
    assert found == {
        "good": 5,
        "refusal": None,
        "error": f"KeyError, {where}",
        "beside Exception": f"BaseException, {where}",
        "hang": f"hang, {where}",
        "wait": f"hang, {where}",
        "memory": f"out of memory, {where}",
        "crash": Died(signal.SIGKILL),
        "exit": Died(-3),
        "last": 6,
    }


def test_a_message_is_one_line_that_people_can_read():
    for message in ("", "two\nlines", "x" * (LONGEST + 1)):
        error = InputError()
        error.args = (message,)  # InputError itself would shorten it
        assert problem_of_error(error).cause.startswith("message of")


def test_a_refusal_after_an_allocation_failed_comes_too_late():
    late = InputError("this is no checkpoint")
    late.__context__ = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    assert "only once an allocation failed" in problem_of_error(late).cause


def test_equal_is_equal_to_the_last_bit():
    nan = float("nan")
    assert same({"a": [nan, (1, "x")]}, {"a": [nan, (1, "x")]})
    assert not same(1, 1.0)
    assert not same({"a": 1, "b": 2}, {"a": 1})


def test_a_process_changes_nothing_outside_of_its_folder(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.write_text("whole", encoding="utf-8")
    (inside / "link").symlink_to(outside)
    code = f"""
import os, pathlib, shutil
from tests.fuzz.confinement import Escaped, confine
inside, outside = pathlib.Path({str(inside)!r}), pathlib.Path({str(outside)!r})
confine(inside)
(inside / "new").write_text("x")
def refused(action, *arguments):
    try:
        action(*arguments)
    except Escaped:
        return True
attempts = [(outside.write_text, ""), ((inside / "link").write_text, ""), (outside.unlink,),
            (os.replace, inside / "new", outside), (outside.with_name("x").mkdir,), (shutil.rmtree, outside.parent)]
raise SystemExit(0 if all([refused(*each) for each in attempts]) else 1)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert outside.read_text(encoding="utf-8") == "whole"
    assert not issubclass(Escaped, Exception)
