"""The data of a resumed run: those that it began with, wherever they lie now, or a line that says what changed."""

import io
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lepton import checkpoint
from lepton.errors import InputError
from lepton.train.settings import TrainSettings
from lepton.train.trainer import train
from tests.train.small import metrics_of, small_run


@pytest.fixture(scope="module")
def begun(data, tmp_path_factory):
    """A project with data/ and out/, a run of 8 steps that was stopped after 4, started with relative paths."""
    home = tmp_path_factory.mktemp("project")
    shutil.copytree(data, home / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        small_run(Path("data"), Path("out"))
    whole = metrics_of(home / "out")
    for name in ("step_8.pt", "final.pt"):
        (home / "out" / name).unlink()
    return SimpleNamespace(home=home, whole=whole)


@pytest.fixture
def project(begun, tmp_path, monkeypatch):
    """A copy of it whose data lie where the checkpoint says, with the user in another folder."""
    home = tmp_path / "project"
    shutil.copytree(begun.home, home)
    rewrite(home, lambda content: content["data"].update(folder=str(home / "data")))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return home


def rewrite(home, change):
    content = checkpoint.load(home / "out" / "step_4.pt")
    change(content)
    checkpoint.save(home / "out" / "step_4.pt", content)


def resume(home, **settings):
    """Go on with these settings alone; return what was printed."""
    stream = io.StringIO()
    train(TrainSettings(resume=str(home / "out" / "step_4.pt"), device="cpu", **settings), stream=stream)
    return stream.getvalue()


def replace_data(home):
    """Write other training data of the same shape, as `prepare --force` may."""
    rows = np.load(home / "data" / "shard_00000.npy")
    np.save(home / "data" / "shard_00000.npy", rows[::-1])


def test_a_run_is_resumed_from_another_folder(begun, project):
    resume(project)
    assert metrics_of(project / "out") == begun.whole


def test_a_project_that_has_moved_finds_its_data_beside_it(begun, project, monkeypatch):
    rewrite(project, lambda content: content["data"].update(folder=str(project / "gone")))
    with pytest.raises(InputError, match=r"the data of .*step_4\.pt are not where they were: .*gone; .*--data_dir"):
        resume(project)
    text = resume(project, data_dir=str(project / "data"))
    assert "other data" not in text, "they are the same"
    monkeypatch.chdir(project)
    resume(project)
    assert metrics_of(project / "out") == begun.whole


def test_data_that_were_replaced_are_refused_unless_allowed(project):
    replace_data(project)
    before = sorted(path.name for path in (project / "out").iterdir())
    for given in ({}, {"data_dir": str(project / "data")}):
        with pytest.raises(InputError, match=r"data holds other data than .*step_4\.pt was trained on") as error:
            resume(project, **given)
        assert "(training: 4,992 tokens (hash " in str(error.value)
        assert "validation" not in str(error.value), "those are the same"
        assert str(error.value).endswith("or go on with these: --allow_other_data")
    assert sorted(path.name for path in (project / "out").iterdir()) == before
    text = resume(project, allow_other_data=True)
    assert "other data than before: training: 4,992 tokens (hash " in text
    (project / "out" / "final.pt").unlink()
    (project / "out" / "step_4.pt").unlink()
    assert "other data" not in resume_auto(project), "from then on they are the run's own"


def resume_auto(home):
    stream = io.StringIO()
    train(TrainSettings(resume="auto", checkpoint_dir=str(home / "out"), device="cpu"), stream=stream)
    return stream.getvalue()


def test_naming_another_folder_is_a_wish_for_its_data(project, tmp_path):
    shutil.copytree(project / "data", tmp_path / "other" / "data")
    replace_data(tmp_path / "other")
    assert "other data than before: training: " in resume(project, data_dir=str(tmp_path / "other" / "data"))


def test_a_checkpoint_without_a_fingerprint_goes_on_as_before(begun, project, monkeypatch):
    rewrite(project, lambda content: content.pop("data"))
    with pytest.raises(InputError, match=r"not where they were: data \(relative to the folder in which"):
        resume(project)
    monkeypatch.chdir(project)
    resume(project)
    assert metrics_of(project / "out") == begun.whole
