"""`import lepton`: what a user imports from it, and that it waits for nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

import lepton
from lepton import Lepton, Tokenizer
from tests.cli.tiny import save_tiny

ROOT = Path(__file__).parents[1]


def test_the_package_has_the_model_and_the_tokenizer():
    assert (Lepton.__module__, Tokenizer.__module__) == ("lepton.api", "lepton.data.tokenizer")
    assert {"Lepton", "Tokenizer", "__version__"} <= {*dir(lepton)}
    with pytest.raises(AttributeError, match="module 'lepton' has no attribute 'Leptons'"):
        _ = lepton.Leptons


def test_importing_it_does_not_wait_for_torch():
    code = "import sys, lepton; lepton.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_model_from_a_checkpoint_has_its_tokenizer(tmp_path):
    model, tokenizer = save_tiny(tmp_path / "with.pt")
    loaded = Lepton.from_checkpoint(tmp_path / "with.pt")
    assert isinstance(loaded.tokenizer, Tokenizer)
    assert loaded.tokenizer.hash == tokenizer.hash
    assert loaded.tokenizer is loaded.tokenizer
    save_tiny(tmp_path / "without.pt", tokenizer=None)
    assert Lepton.from_checkpoint(tmp_path / "without.pt").tokenizer is None
    assert model.tokenizer is None, "made by hand"


def test_no_text_names_a_package_that_cannot_be_had():
    """LEPTON is installed from its repository; no index of packages has it."""
    paths = [path for folder in ("lepton", "docs", "examples") for path in (ROOT / folder).rglob("*.*")]
    texts = [path for path in [*paths, *ROOT.glob("*.md")] if path.suffix in (".py", ".md", ".html")]
    assert len(texts) > 200
    assert [path for path in texts if "lepton-lm" in path.read_text(encoding="utf-8")] == []
