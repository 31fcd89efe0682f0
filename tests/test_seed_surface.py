"""Every command and snippet of the seed's README works as written.

Shortened, so that a CPU gets through them: --max_steps, --seq_len, validations, samples, max_new_tokens, and
--grad_accum where the README does not name it. One command trains the whole size, by AdamW, for the snippet that loads
it; the others narrow it. Data and `pile_tokenizer.json` are small files in the public form.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lepton.cli import train as train_command
from lepton.cli.arguments import Parser
from lepton.data.tokenizer import Tokenizer
from lepton.model.size_config import size_config
from lepton.presets import SIZES
from lepton.train.settings import TrainSettings
from tests.cli.tiny import TEXT, small_bpe

ROOT = Path(__file__).parents[1]

README = """
## Model Sizes

| Model | Params | When to use it |
|-------|--------|----------------|
| NANO | ~10M | Debugging |
| MICRO | ~25M | Quick experiments |
| TINY | ~112M | Development |
| SMALL | ~160M | Overnight runs |
| MEDIUM | ~350M | Real training |
| LARGE | ~760M | Full scale |
| XL | ~1.5B | If you have the GPU |
| XXL | ~3B | Go big or go home |

### Train

```bash
# Basic training
python train.py --model_size tiny --batch_size 2 --grad_accum 32

# Custom paths
python train.py --model_size tiny --data_dir /path/to/data --checkpoint_dir /path/to/checkpoints

# Resume from checkpoint
python train.py --model_size tiny --resume checkpoints/step_5000.pt
```

### Training Flags

| Flag | Default | What it does |
|------|---------|--------------|
| `--model_size` | tiny | Pick your size |
| `--batch_size` | 4 | Batch size |
| `--grad_accum` | 16 | Gradient accumulation |
| `--lr` | 6e-4 | Learning rate |
| `--max_steps` | 50000 | When to stop |
| `--seq_len` | 512 | Sequence length |
| `--data_dir` | - | Where your shards are |
| `--checkpoint_dir` | checkpoints | Where to save |
| `--resume` | - | Checkpoint to continue from |

## Generation

```python
from model import create_lepton_tiny
import torch

model = create_lepton_tiny()
model.load_state_dict(torch.load('checkpoint.pt')['model'])
model.eval()

# Fast generation with speculative decoding
tokens = model.generate(prompt_ids, max_new_tokens=100, use_speculative=True)

# Get uncertainty scores too
tokens, uncertainties = model.generate_with_uncertainty(prompt_ids, max_new_tokens=100)
```
"""
BASIC, CUSTOM_PATHS, RESUME = re.findall(r"^python .*", README, re.MULTILINE)
SNIPPET = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
ADAMW = "--optimizer adamw"  # muon's products of matrices of the whole size take most of a step; the others have it
SHORTER = "--max_steps 1 --seq_len 16 --eval_batches 1 --sample_tokens 2"
NARROWER = "--override width=64 --override layers=3 --override heads=1 --override kv_heads=1 --override ffn=64"
NEW_TOKENS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with the scripts' neighbours: pile_tokenizer.json, and shards of rows of 2,048 tokens."""
    folder = tmp_path_factory.mktemp("seed")
    small_bpe().save(str(folder / "pile_tokenizer.json"))
    ids = Tokenizer.from_json((folder / "pile_tokenizer.json").read_text(encoding="utf-8")).encode(TEXT * 300)
    rows = np.array(ids[: 6 * 2048], dtype=np.int64).reshape(6, 2048)
    (folder / "data").mkdir()
    np.save(folder / "data" / "shard_00000.npy", rows[:3])
    np.save(folder / "data" / "shard_00001.npy", rows[3:])
    (folder / "data" / "metadata.json").write_text(json.dumps({"total_tokens": rows.size}), encoding="utf-8")
    yield folder
    shutil.rmtree(folder)  # some GB


def python_train(folder, command, additions):
    """Run a command of the README with `additions` in `folder`, which holds train.py's data but not train.py."""
    script, *flags = shlex.split(f"{command} {additions}")[1:]
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *flags],
        cwd=folder,
        env=os.environ | {"LEPTON_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def checkpoint_of(path):
    return torch.load(path)


def test_basic_training_leaves_checkpoints_that_resume_with_the_tokenizer_beside_them(folder):
    out = python_train(folder, BASIC, f"--save_every 1 --data_dir data {SHORTER} {NARROWER}")
    assert "1,024 tokens per step" in out, "2 windows of 16 tokens, 32 times"
    final = checkpoint_of(folder / "checkpoints" / "final.pt")
    assert final["step"] == 1
    assert final["size"] == "tiny"
    expected = Tokenizer.from_json((folder / "pile_tokenizer.json").read_text(encoding="utf-8")).hash
    assert Tokenizer.from_json(final["tokenizer"]).hash == expected

    (folder / "checkpoints" / "step_1.pt").rename(folder / "checkpoints" / "step_5000.pt")
    out = python_train(folder, RESUME, "--max_steps 2 --grad_accum 1")
    assert "at step 1" in out
    final = checkpoint_of(folder / "checkpoints" / "final.pt")
    assert final["step"] == 2
    assert final["training"]["seq_len"] == 16, "what is not given again stays"


def test_custom_paths_and_the_generation_snippet(folder, monkeypatch):
    command = CUSTOM_PATHS.replace("/path/to/data", "data").replace("/path/to/checkpoints", "elsewhere/checkpoints")
    python_train(folder, command, f"--grad_accum 1 {ADAMW} {SHORTER}")
    final = folder / "elsewhere" / "checkpoints" / "final.pt"
    content = checkpoint_of(final)
    assert (content["step"], content["config"]) == (1, size_config("tiny").to_dict())

    monkeypatch.chdir(folder)
    final.rename("checkpoint.pt")
    names = {"prompt_ids": [5, 6, 7]}
    exec(SNIPPET.replace("max_new_tokens=100", f"max_new_tokens={NEW_TOKENS}"), names)
    assert names["tokens"][:3] == [5, 6, 7]
    new = len(names["tokens"]) - 3
    assert 1 <= new <= NEW_TOKENS
    assert len(names["uncertainties"]) == new
    assert all(0 <= value <= 1 for value in names["uncertainties"])


FLAGS = dict(re.findall(r"^\| `--(\w+)` \| (\S+) \|", README, re.MULTILINE))


def flags_parser():
    parser = Parser(prog="train.py")
    train_command.add_arguments(parser)
    return parser


@pytest.mark.parametrize("name", FLAGS)
def test_each_flag_of_the_table_is_there(name):
    flags = vars(flags_parser().parse_args([f"--{name}", FLAGS[name]]))
    flags.pop("json", None)
    value = getattr(train_command.settings_of(flags), name)
    assert value == type(value)(FLAGS[name])


def test_the_defaults_are_those_of_the_table():
    assert len(FLAGS) == 9
    helps = {action.dest: action.help for action in flags_parser()._actions}
    defaults = TrainSettings().to_dict()
    for name, default in FLAGS.items():
        if default != "-":
            assert f"default: {default}" in helps[name]
        if defaults[name] is not None:  # None: the run chooses, and the help says what
            assert defaults[name] == type(defaults[name])(default)


def test_the_sizes_have_the_names_and_targets_of_the_table():
    listed = re.findall(r"^\| ([A-Z]+) \| ~([\d.]+)([MB]) \|", README, re.MULTILINE)
    found = {name.lower(): round(float(number) * {"M": 1e6, "B": 1e9}[unit]) for name, number, unit in listed}
    assert found == {name: preset.target_params for name, preset in SIZES.items()}
