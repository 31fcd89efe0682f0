import errno
import subprocess
import sys
from pathlib import Path

import pytest

from lepton.errors import InputError
from lepton.train import lock
from lepton.train.lock import LOCK, locked

ROOT = Path(__file__).parents[2]
# The file alone, since importing the package takes seconds.
HOLDS = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("lock", sys.argv[1])
lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lock)
with lock.locked(pathlib.Path(sys.argv[2]), print):
    print("held", flush=True)
    sys.stdin.read()
"""


def silent(text):
    raise AssertionError(text)


def test_a_second_one_is_refused_and_names_the_first(tmp_path):
    with locked(tmp_path, silent):
        for _ in range(2):
            with (
                pytest.raises(InputError, match=r"is in use by another run \(process \d+ on .+\): .*--checkpoint_dir"),
                locked(tmp_path, silent),
            ):
                pass
    with locked(tmp_path, silent):
        pass
    assert list(tmp_path.iterdir()) == []


def test_it_is_released_when_the_run_fails(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), locked(tmp_path, silent):
            raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_nothing_came_into_goes_again(tmp_path):
    with locked(tmp_path / "a" / "b", silent):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a" / "b", silent):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]
    (tmp_path / "own").mkdir()
    with locked(tmp_path / "own", silent):
        pass
    assert (tmp_path / "own").is_dir()


def test_what_a_killed_process_has_left_is_taken_over(tmp_path):
    line = [sys.executable, "-c", HOLDS, lock.__file__, str(tmp_path)]
    process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout.readline().strip() == b"held"
    with pytest.raises(InputError, match=f"process {process.pid} on"), locked(tmp_path, silent):
        pass
    process.kill()
    process.communicate()
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path, silent):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows locks in another way")
def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch):
    def missing(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", missing)
    said = []
    with locked(tmp_path, said.append):
        pass
    assert said == [f"{tmp_path} cannot be locked here (No locks available): do not start a second run in it"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with (
            pytest.raises(InputError, match=r"checkpoint_dir=.* is not a folder and cannot be made one"),
            locked(path, silent),
        ):
            pass
    (tmp_path / LOCK).mkdir()
    with (
        pytest.raises(InputError, match=r"cannot write in .*: .*; name another --checkpoint_dir"),
        locked(tmp_path, silent),
    ):
        pass
