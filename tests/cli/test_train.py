import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lepton.cli import train as command
from lepton.cli.arguments import Parser
from lepton.train.settings import TrainSettings
from tests.cli.tiny import run
from tests.streams import Watched
from tests.train.small import SHAPE, write_data

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("cli") / "data")


def words(data, out, *extra):
    shape = [word for name, value in SHAPE.items() for word in ("--override", f"{name}={value}")]
    fixed = ["--model-size", "nano", "--seq_len", "16", "--batch_size", "2", "--sample_tokens", "2", "--device", "cpu"]
    places = ["--data_dir", str(data), "--tokenizer", str(data / "tokenizer.json"), "--checkpoint_dir", str(out)]
    return [*fixed, *shape, *places, *map(str, extra)]


def settings_of(*flags):
    parser = Parser(prog="train.py")
    command.add_arguments(parser)
    flags = vars(parser.parse_args(flags))
    flags.pop("json", None)
    return command.settings_of(flags)


def test_without_flags_the_settings_are_the_defaults():
    assert settings_of() == TrainSettings()


def test_every_setting_has_a_flag():
    parser = Parser(prog="train.py")
    command.add_arguments(parser)
    flags = {action.dest for action in parser._actions}
    assert flags == TrainSettings().to_dict().keys() | {"help", "json"}


def test_the_help_tells_the_true_defaults():
    parser = Parser(prog="train.py")
    command.add_arguments(parser)
    for action in parser._actions:
        default = getattr(TrainSettings(), action.dest, None)
        if default not in (None, False, {}) and action.metavar != "DIR":
            said = action.help.partition("(default: ")[2].rstrip(")")
            assert said, action.dest
            assert said == default if isinstance(default, str) else float(said) == default


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--lr", "1e-3"], "lr", 1e-3),
        (["--grad-accum=2"], "grad_accum", 2),
        (["--batch_size", "8"], "batch_size", 8),
        (["--batch_size", "auto"], "batch_size", None),
        (["--compile"], "compile", True),
        (["--no_compile"], "compile", False),
        (["--no-compile"], "compile", False),
        (["--dense"], "dense", True),
        (["--override", "window=16", "--override", "embed_rank=None"], "overrides", {"window": 16, "embed_rank": None}),
    ],
)
def test_flags_become_settings(flags, name, value):
    assert getattr(settings_of(*flags), name) == value


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_size", "tinny"], "unknown value 'tinny'; did you mean 'tiny'?"),
        (["--grad_acum", "2"], "unknown flag '--grad_acum'; did you mean '--grad_accum'?"),
        (["--lr", "fast"], "invalid float value: 'fast'"),
        (["--batch_size", "all"], "'all' is neither a whole number nor auto"),
        (["--override", "window"], "'window' is not NAME=VALUE"),
        (["--override", "widow=3"], "unknown configuration field 'widow'; did you mean 'window'?"),
        (["--max_steps", "0"], "max_steps=0: must be at least 1"),
        (["--device", "gpu"], "device 'gpu' cannot be used here"),
        (["--device", "mps"], "device 'mps' is not supported"),
        (["--dtype", "fp64"], "unknown value 'fp64'; did you mean 'fp32'?"),
        (["--seed", str(2**64)], "seed=a number of more bits: must be a whole number of 64 bits"),
        (["--resume", "nowhere/step_5.pt"], "step_5.pt does not exist; no whole checkpoint is there"),
        (["--tokenizer", "nowhere.json"], "no such tokenizer: nowhere.json"),
        (["--data_dir", "nowhere"], "no such folder: nowhere"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = [word for name, value in SHAPE.items() for word in ("--override", f"{name}={value}")]
    usual = [] if "--tokenizer" in flags else [*small, "--override", "vocab_size=50257"]
    code, out, err = run("train", *usual, *flags)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == [], "a mistake makes no folder"


def test_another_size_than_the_checkpoints(data, tmp_path):
    assert run("train", *words(data, tmp_path / "out", "--max_steps", 1))[0] == 0
    code, _, err = run("train", "--model_size", "micro", "--resume", tmp_path / "out" / "step_1.pt")
    assert code == 2
    assert "of size 'nano', --model_size asks for 'micro'" in err


def test_with_json_stdout_is_json_alone(data, tmp_path):
    code, out, err = run("train", *words(data, tmp_path / "out", "--max_steps", 2, "--json"))
    assert code == 0
    result = json.loads(out)
    ideas = {"calibration_error", "tokens_per_step", "mean_depth"}
    assert result.keys() == {"checkpoint", "step", "val_loss", "val_bpb", *ideas}
    assert (result["step"], result["checkpoint"]) == (2, str(tmp_path / "out" / "final.pt"))
    assert "2 steps in about" in err


def test_an_interrupted_run_says_how_to_go_on(data, tmp_path):
    def screen():
        return Watched("step 3/4", lambda: signal.raise_signal(signal.SIGTERM))

    code, _, err = run("train", *words(data, tmp_path, "--max_steps", 4, "--log_every", 1), screen=screen)
    path = tmp_path / "step_3.pt"
    assert (code, err) == (143, f"stopped at step 3, saved {path}; go on with --resume {path}\n")


@pytest.mark.parametrize(
    ("own", "then"),
    [
        ({}, {"GOMP_SPINCOUNT": "2000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_waiting_threads_spin_for_a_moment_unless_the_user_wants_otherwise(data, tmp_path, monkeypatch, own, then):
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    monkeypatch.setattr("os.environ", environment | own)
    assert run("train", *words(data, tmp_path, "--max_steps", 1))[0] == 0
    found = {name: os.environ.get(name) for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if name in os.environ}
    assert found == then


def test_train_py_is_the_command_and_a_resumed_run_goes_on(data, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def train_py(*flags):
        line = [sys.executable, str(ROOT / "train.py"), *map(str, flags)]
        return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    first = train_py(*words(data, "checkpoints", "--max_steps", 2))
    assert (first.returncode, first.stderr) == (0, "")
    assert f"checkpoint: {Path('checkpoints', 'final.pt')}" in first.stdout
    second = train_py("--model_size", "nano", "--resume", "checkpoints/step_2.pt", "--max_steps", 3)
    assert second.returncode == 0, second.stderr
    assert "changed max_steps: 2 -> 3" in second.stdout
    assert (tmp_path / "checkpoints" / "step_3.pt").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM there ends a process without asking it")
def test_sigterm_saves_and_gives_143(data, tmp_path):
    line = [
        sys.executable,
        "train.py",
        *words(data, tmp_path, "--max_steps", 10**6, "--eval_every", 10**6, "--log_every", 1),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(line, cwd=ROOT, env=environment, text=True, **pipes)
    while not process.stdout.readline().startswith("step 2/"):
        assert process.poll() is None, process.stderr.read()
    process.terminate()
    _, errors = process.communicate()
    assert process.returncode == 143, errors
    (path,) = tmp_path.glob("step_*.pt")
    step = torch.load(path)["step"]
    assert errors.endswith(f"stopped at step {step}, saved {path}; go on with --resume {path}\n")
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(step + 1))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows reports a closed pipe in its own way")
def test_a_reader_that_leaves_gets_a_save_and_the_code_of_the_pipe(data, tmp_path):
    """`train.py ... | head -2`: one line that says how to go on, and nothing of the interpreter's last flush."""
    flags = words(data, tmp_path, "--max_steps", 10**6, "--eval_every", 10**6, "--log_every", 1)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "train.py", *flags], cwd=ROOT, env=environment, text=True, **pipes)
    assert process.stdout.readline().startswith("nano: ")
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141
    assert errors.startswith("stopped at step ")
    assert errors.count("\n") == 1
    (path,) = tmp_path.glob("step_*.pt")
    assert errors.endswith(f"go on with --resume {path}\n")


def test_torch_is_not_needed_to_be_helped():
    code = "import sys; from lepton.cli.main import main; main(['train', '--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--grad_accum" in done.stdout
