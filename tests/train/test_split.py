import pytest
import torch

from lepton import checkpoint
from lepton.errors import InputError
from lepton.train import assembly, trainer
from lepton.train.micro_step import MicroStep
from lepton.train.phases import Phases
from lepton.train.progress import Progress
from lepton.train.settings import TrainSettings
from lepton.train.split import USABLE, check_shared, largest_split, rows_at_once, smaller_splits, validated_alike
from lepton.train.starting_point import find_starting_point
from tests.train.small import losses_of, metrics_of, small_run, small_settings


def predicted(settings):
    """1 GB, and 1 GB a row."""
    return 10**9 * (1 + settings.split[0])


def test_smaller_splits_are_the_same_step():
    found = [each.split for each in smaller_splits(TrainSettings(batch_size=6, grad_accum=2, lr=1.0))]
    assert found == [(4, 3), (3, 4), (2, 6), (1, 12)]
    assert list(smaller_splits(TrainSettings(batch_size=1, grad_accum=5))) == []


@pytest.mark.parametrize(
    ("batch_size", "grad_accum", "room_gb", "expected"),
    [
        (None, 16, 100, (64, 1)),
        (None, 16, 40, (32, 2)),
        (None, 32, 140, (64, 2)),
        (None, 1, 100, (4, 1)),
        (2, 32, 100, (64, 1)),
        (2, 32, 20, (16, 4)),
        (3, 5, 15, (5, 3)),
        (7, 1, 8, (1, 7)),
        (None, 16, 1, (1, 64)),
        (None, 16, None, (4, 16)),
        (8, 2, None, (8, 2)),
    ],
)
def test_the_largest_that_fits(batch_size, grad_accum, room_gb, expected):
    settings = TrainSettings(batch_size=batch_size, grad_accum=grad_accum, lr=1.0)
    available = None if room_gb is None else room_gb * 10**9
    found = largest_split(settings, predicted, available)
    assert found.split == expected
    assert found == settings.replace(batch_size=expected[0], grad_accum=expected[1]), "nothing else changes"


def test_a_part_of_the_memory_is_left():
    settings = TrainSettings(batch_size=None, grad_accum=16)
    room = int(65 * 10**9 / USABLE)
    assert largest_split(settings, predicted, room + 9).split == (64, 1)
    assert largest_split(settings, predicted, room - 9).split == (32, 2)


@pytest.mark.parametrize(("batch_size", "eval_batches"), [(64, 1), (32, 2), (5, 12), (1, 64), (128, 1)])
def test_a_validation_reads_the_rows_that_it_would_read_anyway(batch_size, eval_batches):
    settings = TrainSettings(batch_size=batch_size, grad_accum=1)
    found = validated_alike(settings, 16)
    assert found == settings.replace(eval_batches=eval_batches)


@pytest.mark.parametrize(
    ("batch_size", "seq_len", "rows"), [(4, 512, 4), (64, 512, 64), (192, 512, 64), (129, 512, 43), (8, 1 << 16, 1)]
)
def test_a_validation_reads_some_rows_at_a_time(batch_size, seq_len, rows):
    assert rows_at_once(TrainSettings(batch_size=batch_size, grad_accum=1, seq_len=seq_len)) == rows


def test_auto_on_a_cpu_is_the_usual_split(data, tmp_path):
    small_run(data, tmp_path / "named", batch_size=4, grad_accum=2)
    _, text = small_run(data, tmp_path / "auto", batch_size=None, grad_accum=2)
    assert "--batch_size auto: the 8 rows of a step 4 at a time\n" in text
    assert metrics_of(tmp_path / "auto") == metrics_of(tmp_path / "named")


class Small(MicroStep):
    """Micro-batches on a GPU without memory for more than two rows."""

    def prepare(self, batch_size, seq_len, *, answers=False):
        if batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_auto_takes_the_next_smaller_split_until_one_fits(data, tmp_path, monkeypatch):
    usual = small_settings(data, tmp_path).eval_batches
    small_run(data, tmp_path / "named", batch_size=2, grad_accum=4, eval_batches=2 * usual)
    monkeypatch.setattr(assembly, "gpu_memory", lambda device: (10**12, 10**12))
    monkeypatch.setattr(trainer, "MicroStep", Small)
    auto = {"batch_size": None, "grad_accum": 2}
    _, text = small_run(data, tmp_path / "auto", **auto)
    lines = [line for line in text.splitlines() if "rows of a step" in line]
    assert lines == [
        "--batch_size auto: the 8 rows of a step at once",
        "that was too much for the GPU's memory: the 8 rows of a step 4 at a time",
        "that was too much for the GPU's memory: the 8 rows of a step 2 at a time",
    ]
    assert checkpoint.load(tmp_path / "auto" / "final.pt")["training"] | {"checkpoint_dir": ""} == {
        **checkpoint.load(tmp_path / "named" / "final.pt")["training"],
        "checkpoint_dir": "",
    }
    assert losses_of(tmp_path / "auto") == losses_of(tmp_path / "named")


def test_auto_goes_on_with_the_split_of_its_run(data, tmp_path, monkeypatch):
    """On whatever card: another split would round otherwise. Where it does not fit, the run says so and ends."""
    monkeypatch.setattr(assembly, "gpu_memory", lambda device: (10**12, 10**12))
    auto = {"batch_size": None, "grad_accum": 2}
    small_run(data, tmp_path, **auto)
    whole = metrics_of(tmp_path)
    assert checkpoint.load(tmp_path / "step_4.pt")["training"]["batch_size"] == 8
    for path in ("step_8.pt", "final.pt", "best.pt"):
        (tmp_path / path).unlink()
    monkeypatch.setattr(assembly, "gpu_memory", lambda device: (0, 10**12))
    small_run(data, tmp_path, **auto, resume="auto")
    assert metrics_of(tmp_path) == whole
    with pytest.raises(InputError, match=r"--batch_size auto --grad_accum 4 is a step of 16 rows, .* has 8 x 1: "):
        small_run(data, tmp_path, batch_size=None, grad_accum=4, resume="auto")
    monkeypatch.setattr(trainer, "MicroStep", Small)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.Trainer(
            find_starting_point(small_settings(data, tmp_path, resume="auto"), {"checkpoint_dir", "resume"}),
            Progress(None),
            Phases(),
        ).run()


def split_of(batch_size, grad_accum):
    return TrainSettings(batch_size=batch_size, grad_accum=grad_accum)


def test_several_processes_get_splits_that_they_can_share():
    assert [each.split for each in smaller_splits(split_of(8, 1), 2)] == [(4, 2), (2, 4), (1, 8)]
    assert largest_split(split_of(4, 2), lambda each: each.split[0], 100, 2).split == (4, 2)
    check_shared(split_of(4, 6), 3)


@pytest.mark.parametrize(
    ("split", "processes", "advice"),
    [
        ((4, 3), 2, "use --batch_size 3 --grad_accum 4 (the same step), or --grad_accum 2 or 4, or start 1 process"),
        ((1, 1), 2, "use --grad_accum 2, or start 1 process"),
        ((1, 8), 6, "use --grad_accum 6 or 12, or start 4 processes"),
    ],
)
def test_a_split_that_they_cannot_share_is_refused_with_what_is_near(split, processes, advice):
    with pytest.raises(InputError) as caught:
        check_shared(split_of(*split), processes)
    assert str(caught.value).endswith(f"evenly: {advice}")
