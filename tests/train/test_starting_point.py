import pytest

from lepton import checkpoint
from lepton.api import Lepton
from lepton.errors import InputError
from lepton.train.settings import TrainSettings
from lepton.train.starting_point import find_starting_point
from tests.cli.tiny import small_bpe
from tests.train.small import SHAPE, small_run, small_settings


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The folder of a finished run of 8 steps."""
    out = tmp_path_factory.mktemp("run") / "out"
    small_run(data, out)
    return out


def started(**settings):
    settings = TrainSettings(**settings)
    return find_starting_point(settings, settings.changed())


def test_a_fresh_start(data, tmp_path):
    start = find_starting_point(small_settings(data, tmp_path), set())
    assert (start.step, start.weights, start.resumed, start.size) == (0, None, None, "nano")
    assert start.config.width == SHAPE["width"]
    assert start.notes == []


def test_the_size_is_tiny_without_a_word(tmp_path):
    assert started().size == "tiny"
    start = started(resume="auto", checkpoint_dir=str(tmp_path / "none"))
    assert start.step == 0
    assert start.notes == [f"no checkpoint in {tmp_path / 'none'} yet: starting afresh"]


def test_the_dense_baseline(data, tmp_path):
    start = find_starting_point(small_settings(data, tmp_path, dense=True, overrides={}), set())
    assert start.config.dense
    assert start.config.window is None


def test_resuming_takes_everything_from_the_checkpoint(run):
    start = started(resume=str(run / "step_4.pt"))
    assert (start.step, start.size, start.settings.seq_len, start.settings.max_steps) == (4, "nano", 32, 8)
    assert start.settings.checkpoint_dir == str(run), "it goes on where its checkpoint lies"
    assert start.settings.overrides == SHAPE
    assert start.notes == [f"resuming {run / 'step_4.pt'} at step 4"]


def test_auto_is_the_newest_whole_one(run, tmp_path):
    for name in ("step_4.pt", "step_8.pt"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    assert started(resume="auto", checkpoint_dir=str(tmp_path)).step == 8
    with open(tmp_path / "step_8.pt", "r+b") as file:
        file.truncate(1000)
    start = started(resume="auto", checkpoint_dir=str(tmp_path))
    assert start.step == 4
    assert start.notes[0] == f"skipped {tmp_path / 'step_8.pt'}: not whole"


def test_changes_are_reported(run):
    start = started(resume=str(run / "step_4.pt"), lr=1e-3, max_steps=20, optimizer="adamw", seq_len=32)
    assert start.notes[1:] == [
        "changed max_steps: 8 -> 20",
        "changed lr: 0.0006 -> 0.001",
        "changed optimizer: muon -> adamw",
        "adamw starts without the momentum of muon",
    ]


@pytest.mark.parametrize("way", ["resume", "init_from"])
def test_another_size_names_both(run, way):
    with pytest.raises(InputError, match=r"step_4\.pt holds a model of size 'nano', --model_size asks for 'tiny'"):
        started(**{way: str(run / "step_4.pt"), "model_size": "tiny"})


def test_another_shape_names_the_fields(run):
    with pytest.raises(InputError, match=r"has width=32 not 64, ffn=48 not 96: a resumed model keeps its shape"):
        started(resume=str(run / "step_4.pt"), overrides={"width": 64, "ffn": 96, "layers": 3})
    with pytest.raises(InputError, match="has dense=False not True"):
        started(resume=str(run / "step_4.pt"), dense=True)
    with pytest.raises(InputError, match="did you mean 'width'"):
        started(resume=str(run / "step_4.pt"), overrides={"widht": 64})


def test_a_run_that_is_over_says_what_would_go_on(run):
    with pytest.raises(InputError, match=r"step_8\.pt is at step 8: give --max_steps more than 8"):
        started(resume=str(run / "step_8.pt"), max_steps=6)


def test_initial_weights_only(run):
    start = started(init_from=str(run / "best.pt"), overrides={"window": 8}, lr=1e-3)
    assert (start.step, start.resumed) == (0, None)
    assert start.config.window == 8
    assert start.settings.seq_len == 512, "settings are the new run's own"
    Lepton(start.config).load_state_dict(start.weights)


def test_weights_with_ideas_do_not_start_the_dense_baseline(run):
    with pytest.raises(InputError, match=r"best\.pt has dense=False not True"):
        started(init_from=str(run / "best.pt"), dense=True)


def test_weights_alone_do_not_resume(run, data, tmp_path):
    content = checkpoint.load(run / "step_4.pt")
    checkpoint.save(tmp_path / "weights.pt", {name: content[name] for name in ("model", "config", "step")})
    with pytest.raises(InputError, match="holds weights only: start from it with --init_from"):
        started(resume=str(tmp_path / "weights.pt"))
    start = started(init_from=str(tmp_path / "weights.pt"), tokenizer=str(data / "tokenizer.json"))
    assert start.size is None


def test_the_checkpoints_tokenizer_is_used_and_another_one_refused(run, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_bpe(280).save("pile_tokenizer.json")
    assert started(resume=str(run / "step_4.pt")).tokenizer.size == 300
    assert started(resume=str(run / "step_4.pt"), tokenizer=str(data / "tokenizer.json")).tokenizer.size == 300
    assert started().tokenizer.size == 280
    for way in ("resume", "init_from"):
        with pytest.raises(InputError, match="was trained with another tokenizer than"):
            started(**{way: str(run / "step_4.pt"), "tokenizer": "pile_tokenizer.json"})


def test_a_tokenizer_larger_than_the_vocabulary(data, tmp_path):
    settings = small_settings(data, tmp_path, overrides={**SHAPE, "vocab_size": 290})
    with pytest.raises(InputError, match="the tokenizer has 300 ids and the model's vocabulary 290"):
        find_starting_point(settings, set())
