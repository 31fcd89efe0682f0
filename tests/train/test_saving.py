import threading

import pytest
import torch

from lepton.errors import InputError
from lepton.train.saving import Saving, copied
from tests.laws.lab import build


class Folder:
    """A `RunFolder` whose disk works only while `free` is set."""

    def __init__(self):
        self.free = threading.Event()
        self.saved = []
        self.error = None

    def save(self, payload, *, best, step):
        self.free.wait(20)
        if self.error:
            raise self.error
        self.saved.append((payload["model"]["weight"].tolist(), best, step))


@pytest.fixture
def folder():
    return Folder()


@pytest.fixture
def saving(folder):
    saving = Saving(folder, beside=True, say=print)
    yield saving
    folder.free.set()
    saving.close()


def test_what_is_saved_is_what_was_there_at_the_call(folder, saving):
    weight = torch.zeros(2)
    saving.save({"model": {"weight": weight}}, best=True, step=False)
    weight += 1
    assert folder.saved == [], "the steps go on"
    folder.free.set()
    saving.wait()
    assert folder.saved == [([0, 0], True, False)]
    saving.save({"model": {"weight": weight}}, best=False, step=True)
    saving.close()
    assert folder.saved[1:] == [([1, 1], False, True)], "nothing is lost at the end"


def test_a_failure_is_raised_once_at_the_next_call(folder, saving):
    folder.error = InputError("cannot save: No space left on device")
    folder.free.set()
    saving.save({"model": {}}, best=False, step=True)
    with pytest.raises(InputError, match="No space left"):
        saving.save({"model": {}}, best=False, step=True)
    saving.wait()


def test_a_failure_is_raised_as_soon_as_it_is_known(folder, saving):
    folder.error = InputError("cannot save: No space left on device")
    saving.save({"model": {}}, best=False, step=True)
    saving.check()  # not yet
    folder.free.set()
    assert saving._under_way.exception(20)
    with pytest.raises(InputError, match="No space left"):
        saving.check()
    saving.check()


def test_a_failure_that_nobody_asked_for_is_said_at_the_end(folder, saving, capsys):
    folder.error = InputError("cannot save: No space left on device")
    folder.free.set()
    saving.save({"model": {}}, best=False, step=True)
    saving.close()
    assert "the newest checkpoint is missing: cannot save: No space left" in capsys.readouterr().out


def test_at_once(folder):
    folder.free.set()
    saving = Saving(folder, beside=False, say=print)
    saving.save({"model": {"weight": torch.ones(1)}}, best=True, step=True)
    assert folder.saved == [([1], True, True)]
    saving.wait()
    saving.close()


def test_a_copied_state_dict_still_knows_its_configuration():
    weights = build("complete").state_dict()
    kept = copied({"model": weights})["model"]
    assert kept._metadata == weights._metadata
    assert not any(kept[name] is value for name, value in weights.items())
    with pytest.raises(InputError, match="these weights are of a model with"):
        build("odd edges").load_state_dict(kept)


def test_a_copy_shares_no_tensor():
    value = {"a": [torch.ones(2), (torch.zeros(1), "x")], "b": 3}
    copy = copied(value)
    value["a"][0].zero_()
    assert copy["a"][0].tolist() == [1, 1]
    assert copy["a"][1][1:] == ("x",)
    assert type(copy["a"][1]) is tuple
    assert copy["b"] == 3
