"""Taking an idea out, its file and its lines in the list of ideas, leaves a package that imports, trains and writes."""

import os
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
import importlib, pkgutil
import torch, lepton
assert lepton.__path__ == [os.path.join(folder, "lepton")], lepton.__path__
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
drafts = {} if "drafter" == name else {"drafter.vocab": 100}
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


# The libraries are loaded once, before the process divides: that takes longer than all else.
PROCESS = """
import os, sys, traceback
import contextlib
import numpy, platformdirs, safetensors.torch, tokenizers, torch, torch._dynamo, tqdm
with contextlib.suppress(ImportError):
    from transformers import GenerationMixin, PreTrainedConfig, PreTrainedTokenizerFast
with contextlib.suppress(ImportError):
    import lm_eval.api.model, lm_eval.models.utils
code = sys.stdin.read()
for name, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    torch.set_num_threads(1)  # threads that wait for each other would not outlive the division
    os.chdir(folder)
    sys.path.insert(0, folder)
    result = "works"
    try:
        exec(code, {"os": os, "name": name, "folder": folder})
    except BaseException:
        result = traceback.format_exc()
    with open("result.txt", "w") as file:
        file.write(result)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """For each idea a folder with the package without it, and in it what came of using that."""
    made = {name: tmp_path_factory.mktemp(name).resolve() for name in FILES}
    for name, folder in made.items():
        shutil.copytree(PACKAGE, folder / "lepton", ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "lepton" / "model" / "ideas" / f"{name}.py").unlink()
        listing = folder / "lepton" / "model" / "ideas" / "__init__.py"
        text = listing.read_text(encoding="utf-8")
        (config,) = re.findall(rf"from lepton\.model\.ideas\.{name} import (\w+)", text)
        listing.write_text("".join(line for line in text.splitlines(True) if config not in line), encoding="utf-8")
    words = [word for name, folder in made.items() for word in (name, str(folder))]
    subprocess.run([sys.executable, "-c", PROCESS, *words], input=CODE, cwd=made[FILES[0]], text=True, check=True)
    return made


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", FILES)
def test_without_it_the_rest_works(name, folders):
    assert (folders[name] / "result.txt").read_text() == "works"
