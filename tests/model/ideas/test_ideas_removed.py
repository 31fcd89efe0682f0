"""Taking an idea out, its file and its lines in the list of ideas, leaves a package that imports, trains and writes."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[3] / "lepton"
FILES = [
    path.stem for path in sorted((PACKAGE / "model" / "ideas").glob("*.py")) if path.stem not in ("__init__", "idea")
]
CODE = """
import importlib, pkgutil, sys
import torch, lepton
for module in pkgutil.walk_packages(lepton.__path__, "lepton."):
    if "triton" not in module.name and "__main__" not in module.name:
        importlib.import_module(module.name)
from lepton.evals.ablation import ablate
from lepton.api import create_lepton_nano
from lepton.evals.calibration import calibrate
from lepton.train.cost import training_flops_per_token
from lepton.train.memory_forecast import predicted_bytes
from lepton.train.optimizer import Optimizers
torch.manual_seed(0)
drafts = {} if "drafter" in sys.argv else {"drafter.vocab": 100}
model = create_lepton_nano(layers=3, window=16, vocab_size=300, **drafts)
assert len(model.ideas) == 6, list(model.ideas)
optimizers = Optimizers(model, kind="muon", lr=1e-3, muon_lr=0.02, weight_decay=0.1)
tokens = torch.randint(1, 300, (2, 65))
before = model.loss(tokens).loss.item()
for _ in range(3):
    model.loss(tokens).loss.backward()
    optimizers.step(1.0, 1.0)
assert model.loss(tokens).loss.item() < before
model.eval()
assert len(model.generate([5, 6, 7], max_new_tokens=20, seed=0)) > 3
assert training_flops_per_token(model, 2, 64) > 0 and predicted_bytes(model, 2, 64, False) > 0
assert len(list(ablate(model, lambda **options: model(tokens, **options).logits.sum().item()))) > 1
"""


@pytest.mark.parametrize("name", FILES)
def test_without_it_the_rest_works(name, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "lepton", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "lepton" / "model" / "ideas" / f"{name}.py").unlink()
    listing = tmp_path / "lepton" / "model" / "ideas" / "__init__.py"
    text = listing.read_text(encoding="utf-8")
    (config,) = re.findall(rf"from lepton\.model\.ideas\.{name} import (\w+)", text)
    listing.write_text("".join(line for line in text.splitlines(True) if config not in line), encoding="utf-8")
    command = [sys.executable, "-c", CODE, name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
