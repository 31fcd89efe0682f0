"""The model that comes with LEPTON: what takes it where no checkpoint is named, whatever it is."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from lepton import checkpoint, weights
from lepton.api import Lepton
from lepton.errors import InputError
from lepton.model.budget import Budget
from lepton.model.promise import Promise
from lepton.weight_files import to_int8
from tests.cli.test_calibrate import write_shards
from tests.cli.tiny import TEXT, run, run_json, save_tiny

ROOT = Path(__file__).parents[1]
PROMISE = Promise(risk=0.2, threshold=-100.0, confidence=0.99, windows=300, tokens=4800, data="some text")
BUDGET = Budget(max_cost=0.05, least=1e3, share=0.0, cost=0.04, error=0.001, tokens=4800, data="some text")


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A folder with tiny weights in int8 by row, in several files, with a promise and a budget."""
    folder = tmp_path_factory.mktemp("weights")
    save_tiny(folder / "tiny.pt", size="nano", promises=[PROMISE.to_dict()], budgets=[BUDGET.to_dict()])
    content = checkpoint.load(folder / "tiny.pt")
    matrices = {name for name, value in content["model"].items() if value.dim() == 2 and value.is_floating_point()}
    content["model"] = to_int8(content["model"], matrices - {"router.quantiles"})
    files = checkpoint.save_weights(folder / "model.safetensors", content, 1 << 14)
    assert len(files) > 2
    (folder / "tiny.pt").unlink()
    return folder


@pytest.fixture
def shipped(several, tmp_path, monkeypatch):
    """A copy of `several`, where the weights of the package are looked for."""
    folder = tmp_path / "shipped"
    shutil.copytree(several, folder)
    monkeypatch.setattr(weights, "FOLDER", folder)
    return folder


@pytest.fixture
def nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "FOLDER", tmp_path / "none")


def test_the_first_of_several_files_stands_for_all(several):
    assert weights.packaged(several).name.startswith("model-00001-of-0")
    with pytest.raises(InputError, match=r"no weights come with this copy .* name a checkpoint \(--checkpoint FILE\)"):
        weights.packaged(ROOT / "docs")


def test_it_is_the_folder_of_the_package():
    assert weights.FOLDER == ROOT / "lepton" / "weights"


@pytest.fixture(scope="module")
def data_dir(several, tmp_path_factory):
    """Rows of text of which each half has 1,024 tokens."""
    ids = Lepton.from_checkpoint(weights.packaged(several)).tokenizer.encode(TEXT)
    return write_shards(tmp_path_factory.mktemp("data") / "shards", np.resize(ids, (64, 33)))


def test_python_takes_them_without_a_path(shipped):
    model = Lepton.from_checkpoint()
    named = Lepton.from_checkpoint(weights.packaged())
    assert all(torch.equal(value, named.state_dict()[name]) for name, value in model.state_dict().items())
    prompt = model.tokenizer.encode("fox")
    assert model.generate(prompt, max_new_tokens=4, abstain_at=0.2).abstained == [True] * 4, "no logit is below -100"
    assert len(model.generate(prompt, max_new_tokens=4, max_cost=0.05)) == len(prompt) + 4


def test_python_says_what_to_do_without_any(nothing):
    with pytest.raises(InputError, match="name a checkpoint"):
        Lepton.from_checkpoint()


def test_generate_takes_them_and_says_so(shipped):
    flags = "--prompt", "fox", "--seed", 1, "--max_new_tokens", 6, "--dtype", "fp32"
    code, out, err = run("generate", *flags)
    assert (code, err) == (0, "no --checkpoint: NANO of step 7, which comes with LEPTON\n")
    assert out == run("generate", "--checkpoint", weights.packaged(), *flags)[1]
    (shipped / weights.CARD).write_text("A card.", encoding="utf-8")
    assert f"{shipped / weights.CARD} describes it\n" in run("generate", *flags)[2]


@pytest.mark.parametrize(
    ("flags", "key", "values"),
    [
        (["--abstain_at", 0.2], "promise", PROMISE.to_dict()),
        (["--abstain_at", 0.2], "abstained", [True] * 3),
    ],
)
def test_it_abstains_as_was_promised(shipped, flags, key, values):
    assert run_json("generate", "--prompt", "fox", "--max_new_tokens", 3, *flags)[key] == values


def test_it_skips_blocks_as_was_promised(shipped):
    """With this threshold no token goes deeper than the first two blocks."""
    command = "generate", "--prompt", "fox", "--max_new_tokens", 3
    assert run_json(*command, "--max_cost", 0.05)["stats"]["mean_depth"] == 2
    assert run_json(*command)["stats"]["mean_depth"] == 3


def test_what_was_not_promised_is_refused(shipped):
    for flag, known in (("--abstain_at", "0.2"), ("--max_cost", "0.05")):
        code, _, err = run("generate", "--prompt", "fox", flag, 0.3)
        assert code == 2
        assert known in err.splitlines()[-1]


def test_the_other_commands_that_read_take_them(shipped, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    path = str(weights.packaged())
    assert run_json("eval", "--text", tmp_path / "text.txt", "--max_tokens", 20)["checkpoint"] == path
    assert run_json("export", "--out", tmp_path / "w.safetensors")["checkpoint"] == path
    assert checkpoint.load(tmp_path / "w.safetensors")["promises"] == [PROMISE.to_dict()]
    code, out, err = run("chat", "--max_new_tokens", 2, stdin=b"hello\n")
    assert (code, out.endswith("\n")) == (0, True)
    assert err.startswith("no --checkpoint: NANO")


@pytest.mark.parametrize("command", [["calibrate"], ["calibrate", "--risk", "0.1"], ["tune"]])
def test_a_command_that_writes_leaves_them_alone(shipped, command):
    before = {path: path.read_bytes() for path in shipped.iterdir()}
    for flags in ([], ["--checkpoint", weights.packaged()]):
        code, out, err = run(*command, *flags)
        assert (code, out) == (2, "")
        assert (
            err == "error: the model that comes with LEPTON stays as it is: name the checkpoint to write, --out PATH\n"
        )
    assert {path: path.read_bytes() for path in shipped.iterdir()} == before


def test_it_writes_elsewhere_what_it_calibrated(shipped, data_dir, tmp_path):
    out = tmp_path / "mine.safetensors"
    report = run_json("calibrate", "--data_dir", data_dir, "--out", out, "--force")
    assert (report["checkpoint"], report["out"]) == (str(weights.packaged()), str(out))
    assert Lepton.from_checkpoint(out).uncertainty.calibration.tolist() == pytest.approx(
        [report["scale"], report["shift"]]
    )


def test_part_of_a_set_is_not_overwritten(several, tmp_path):
    """It would hold all weights under the name of a part, and the set could no longer be read."""
    mine = tmp_path / "mine"
    shutil.copytree(several, mine)
    code, _, err = run("calibrate", "--checkpoint", weights.packaged(mine))
    assert (code, "is one of several files: name another checkpoint to write, --out PATH" in err) == (2, True)
    Lepton.from_checkpoint(weights.packaged(mine))


@pytest.mark.parametrize(
    "command", [["generate", "--prompt", "a"], ["chat"], ["serve"], ["eval"], ["export", "--out", "x.safetensors"]]
)
def test_commands_say_what_to_do_without_any(nothing, command):
    if command == ["serve"]:
        pytest.importorskip("starlette")
        pytest.importorskip("uvicorn")
    code, out, err = run(*command)
    assert (code, out) == (2, "")
    assert "name a checkpoint (--checkpoint FILE), or train one first" in err


def test_an_installed_copy_needs_no_network_and_no_folder(several, tmp_path):
    """In a process of its own, in a folder of its own; that tries to reach the network ends it."""
    skipped = shutil.ignore_patterns("__pycache__", weights.FILES)
    shutil.copytree(ROOT / "lepton", tmp_path / "site" / "lepton", ignore=skipped)
    shutil.copytree(several, tmp_path / "site" / "lepton" / "weights", dirs_exist_ok=True)
    code = (
        "import socket, sys\n"
        "def refuse(*_): sys.exit('the network was asked for')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from lepton.cli.main import main\n"
        "sys.exit(main(['generate', '--prompt', 'fox', '--max_new_tokens', '3']))"
    )
    (tmp_path / "elsewhere").mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "CUDA_VISIBLE_DEVICES": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "elsewhere",
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("no --checkpoint: NANO of step 7")
    assert done.stdout.startswith("fox")


def test_the_package_holds_what_stands_in_the_folder(shipped):
    with (ROOT / "pyproject.toml").open("rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]["lepton.weights"]
    (shipped / weights.CARD).touch()
    packed = {path for pattern in patterns for path in shipped.glob(pattern)}
    assert packed == {*shipped.iterdir()}
