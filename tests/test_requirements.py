import importlib.metadata
import importlib.util
import tomllib
from pathlib import Path

import pytest

from lepton import requirements

ROOT = Path(__file__).parents[1]


def test_the_versions_are_those_of_the_package():
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = dict(line.split(">=") for line in tomllib.load(file)["project"]["dependencies"])
    del declared["platformdirs"]  # imported only where there is no LEPTON_CACHE
    assert {name: ".".join(map(str, version)) for name, version in requirements.OLDEST.items()} == declared


def test_here_everything_is_there():
    requirements.check()


@pytest.mark.parametrize("version", ["2.13.0", "2.11.0a0+git1234", "3.0", "unknown"])
def test_a_version_that_will_do(monkeypatch, version):
    monkeypatch.setattr(requirements, "OLDEST", {"torch": (2, 11)})
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    requirements.check()


def test_what_is_too_old_or_missing_is_named_with_the_command_that_gets_it(monkeypatch):
    monkeypatch.setattr(requirements, "OLDEST", {"torch": (2, 11), "numpy": (1, 26)})
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"torch": "2.9.1+cpu", "numpy": "2.0"}[name])
    with pytest.raises(requirements.MissingLibrary, match=r'^torch 2\.9\.1\+cpu is too old; .* "torch>=2\.11"$'):
        requirements.check()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"^torch is not installed, numpy is not installed; "):
        requirements.check()


def test_a_library_that_only_one_thing_needs(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.57.1")
    requirements.need("torch", "a chart")
    requirements.need("torch", "a chart", (4, 57))
    with pytest.raises(
        requirements.MissingLibrary, match=r'^a chart needs torch \(torch 4\.57\.1 is too old\); .*"torch>=5\.24"$'
    ):
        requirements.need("torch", "a chart", (5, 24))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(requirements.MissingLibrary, match=r"^a chart needs torch; .* -m pip install torch$"):
        requirements.need("torch", "a chart")
