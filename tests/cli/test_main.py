"""The frame of the command line: help, exit codes, one-line errors with the nearest match, broken pipes."""

import argparse
import importlib
import os
import subprocess
import sys

import pytest

from lepton import __version__
from lepton.cli import main as cli
from lepton.errors import InputError
from tests.cli.tiny import run


def test_help_lists_every_command():
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert all(name in out for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name):
    code, out, err = run(name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: python -m lepton {name}")


def test_help_does_not_wait_for_torch():
    helps = "".join(f"main(['{name}', '--help']);" for name in cli.COMMANDS)
    code = f"import sys; from lepton.cli.main import main; {helps} sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_no_command_is_a_mistake_and_shows_the_help():
    code, out, err = run()
    assert (code, out) == (2, "")
    assert "python -m lepton COMMAND" in err


def test_version():
    assert run("--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["--json"], "unknown flag '--json': a command comes first"),
        (["sizes", "--jsom"], "unknown flag '--jsom'; did you mean '--json'?"),
        (["sizes", "extra"], "unexpected argument 'extra'"),
        (["generate", "--checkpont=x"], "unknown flag '--checkpont'; did you mean '--checkpoint'?"),
        (["generate", "--max-new-token", "1", "--prompt", "a"], "'--max-new-token'; did you mean '--max_new_tokens'?"),
        (["generate", "--checkpoint", "x"], "required: --prompt"),
        (["generate", "--checkpoint", "x", "--prompt", "a", "--top_k", "many"], "invalid int value: 'many'"),
        (["eval", "--checkpoint", "x", "--split", "vall"], "unknown value 'vall'; did you mean 'val'?"),
    ],
)
def test_mistakes_are_one_line_with_the_fix(words, named):
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err


class FakeCommand:
    """A command module that ends as it is asked to."""

    def __init__(self, ending):
        self.ending = ending

    def add_arguments(self, parser: argparse.ArgumentParser):
        parser.add_argument("--value")

    def run(self, args):
        if isinstance(self.ending, BaseException):
            raise self.ending
        return self.ending


@pytest.mark.parametrize(
    ("ending", "code", "message"),
    [
        (0, 0, ""),
        (3, 3, ""),
        (InputError("value=3: must be 4"), 2, "error: value=3: must be 4\n"),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), 2, "error: x.txt: No such file or directory\n"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(143), 143, ""),
    ],
)
def test_how_a_command_ends_decides_the_exit_code(monkeypatch, capsys, ending, code, message):
    monkeypatch.setattr(importlib, "import_module", lambda name: FakeCommand(ending))
    assert cli.run_command("sizes", ["--value", "1"]) == code
    assert capsys.readouterr().err == message


def test_an_error_of_the_system_without_a_file_is_one_line(monkeypatch, capsys):
    ending = OSError(28, "No space left on device")
    monkeypatch.setattr(importlib, "import_module", lambda name: FakeCommand(ending))
    assert cli.run_command("sizes", []) == 2
    assert capsys.readouterr().err == "error: No space left on device\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell that closes streams")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_no_file_gets_the_number_of_a_closed_stream(tmp_path, closed):
    """Else what is printed would stand in a checkpoint."""
    code = (
        "import os, sys; from lepton.cli.main import guarded\n"
        "def command():\n"
        "    number = os.open('file', os.O_CREAT | os.O_WRONLY)\n"
        "    print('out'); print('err', file=sys.stderr)\n"
        "    return 0 if number > 2 else 1\n"
        "sys.exit(guarded(command))"
    )
    line = f'"$0" -c "$1" {closed}'
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(["sh", "-c", line, sys.executable, code], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a full device")
def test_output_that_does_not_fit_on_the_disk_is_one_line():
    code = "import sys; from lepton.cli.main import guarded; sys.exit(guarded(lambda: print('x') or 0))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    line = [sys.executable, "-c", code]
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, env=environment, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (2, b"error: output: No space left on device\n")


@pytest.mark.parametrize(
    "words",
    [["train.py", "--max_steps", "1"], ["-m", "lepton", "sizes"], ["-c", "from model import create_lepton_tiny"]],
    ids=lambda words: words[1],
)
def test_without_its_libraries_it_says_what_to_install(words):
    """Without site-packages, as in a fresh Python."""
    done = subprocess.run([sys.executable, "-S", *words], capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1]
    assert "torch is not installed, numpy is not installed" in last
    assert '-m pip install "torch>=2.11" "numpy>=1.26"' in last
    if words[0] != "-c":
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lambda name: FakeCommand(KeyError("bug")))
    with pytest.raises(KeyError):
        cli.run_command("sizes", [])


def test_run_command_takes_another_program_name(capsys):
    assert cli.run_command("sizes", ["--help"], prog="sizes.py") == 0
    assert capsys.readouterr().out.startswith("usage: sizes.py")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows reports a closed pipe in its own way")
def test_a_closed_pipe_and_a_poor_console_are_quiet():
    """The whole process: a reader that leaves at once, and a console that knows only ASCII."""
    code = "import sys; from lepton.cli.main import guarded; sys.exit(guarded(lambda: print('日本' * 50_000) or 0))"
    process = subprocess.Popen(
        [sys.executable, "-X", "utf8=0", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
    )
    assert process.stdout is not None
    assert process.stdout.read(4) == b"????"
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == cli.PIPE_CLOSED
