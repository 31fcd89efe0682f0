import pytest
import torch

from lepton.api import Lepton
from lepton.model.size_config import size_config
from lepton.train.memory_forecast import USABLE, fitting_flags, predicted_bytes, predicted_memory
from lepton.train.settings import TrainSettings

# Peaks of torch.cuda.max_memory_allocated, in GB: one NVIDIA H200, bf16, Muon, compiled parts.
BEFORE = {"router.exit_stride": 32, "router.into_stem": 0.0, "router.distil": False, "router.expected": False,
          "router.reads_exit": False, "drafter.vocab": 4096, "drafter.reads_stem": False}  # fmt: skip
"""What the sizes had until 2026-11-28, when they were measured."""
MEASURED = {
    ("tiny", False, 32, 512): 6.31,
    ("tiny", False, 64, 512): 10.82,
    ("tiny", False, 128, 512): 19.96,
    ("tiny", True, 64, 512): 9.47,
    ("tiny", True, 128, 512): 17.14,
    ("micro", False, 64, 512): 3.93,
    ("micro", True, 64, 512): 3.06,
    ("medium", False, 64, 1024): 46.75,
}
ROUTED = 10.53
"""The same of TINY, 64 x 512, with the router as it is now and the drafter as it was."""


def shape_of(size, dense=False, dtype=torch.bfloat16, **changes):
    with torch.device("meta"):
        model = Lepton(size_config(size, dense=dense, **changes))
    model.compute_dtype = dtype
    return model


@pytest.mark.parametrize(("size", "dense", "rows", "length"), MEASURED)
def test_near_what_was_measured(size, dense, rows, length):
    predicted = predicted_bytes(shape_of(size, dense, **BEFORE), rows, length, False)
    assert predicted / 1e9 == pytest.approx(MEASURED[size, dense, rows, length], rel=0.1)


def test_near_what_was_measured_with_the_router_of_today():
    drafter = {name: value for name, value in BEFORE.items() if name.startswith("drafter.")}
    predicted = predicted_bytes(shape_of("tiny", **drafter), 64, 512, False)
    assert predicted / 1e9 == pytest.approx(ROUTED, rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_more_of_anything_takes_more(dense, checkpointing):
    model = shape_of("nano", dense)
    by_rows = [predicted_bytes(model, rows, 512, checkpointing) for rows in (1, 2, 3, 4, 16, 64, 100, 1024)]
    by_length = [predicted_bytes(model, 4, length, checkpointing) for length in (8, 64, 100, 512, 513, 1024, 4096)]
    for sizes in (by_rows, by_length):
        assert sizes == sorted(set(sizes))


def test_what_takes_less():
    model = shape_of("tiny")
    usual = predicted_bytes(model, 32, 512, False)
    assert predicted_bytes(model, 32, 512, True) < 0.6 * usual
    assert predicted_bytes(shape_of("tiny", dtype=torch.float32), 32, 512, False) > 1.5 * usual
    muons = predicted_bytes(model, 32, 512, False, "adamw") - usual
    assert 0.2e9 < muons < 0.4e9, "the second average of 71 M parameters, in fp32"


def fake(settings):
    """1 GB of parameters, and 1 MB a token, a tenth of it where blocks are computed again."""
    token = 0.1e6 if settings.checkpoint_activations else 1e6
    return int(1e9 + settings.batch_size * settings.seq_len * token)


@pytest.mark.parametrize(
    ("batch_size", "grad_accum", "checkpointing", "room_gb", "expected"),
    [
        (64, 1, False, 10.5, "--batch_size 16 --grad_accum 4 (the same step), or --checkpoint_activations"),
        (64, 16, False, 3, "--batch_size 2 --grad_accum 512 (the same step)"),
        (64, 16, False, 1.6, "--batch_size 8 --grad_accum 128 --checkpoint_activations (the same step)"),
        (6, 2, False, 5, "--batch_size 4 --grad_accum 3 (the same step), or --checkpoint_activations"),
        (64, 1, True, 3, "--batch_size 32 --grad_accum 2 (the same step)"),
        (1, 16, False, 1.5, "--checkpoint_activations"),
        (1, 16, False, 1.14, "--seq_len 256 --checkpoint_activations"),
        (1, 16, True, 1.12, "--seq_len 64"),
        (2, 16, True, 1.14, "--seq_len 256 --batch_size 1 --grad_accum 32"),
        (1, 16, True, 1, "a smaller --model_size"),
    ],
)
def test_the_advice_names_flags_and_values(batch_size, grad_accum, checkpointing, room_gb, expected):
    settings = TrainSettings(
        batch_size=batch_size, grad_accum=grad_accum, seq_len=512, checkpoint_activations=checkpointing
    )
    assert fitting_flags(settings, fake, int(room_gb * 1e9)) == expected


def shared(settings, shards):
    assert settings.shard
    return fake(settings) - int(1e9 * (1 - 1 / shards))


@pytest.mark.parametrize(
    ("room_gb", "rows", "advice"),
    [
        (0.7, 16, "--grad_accum 16"),
        (0.4, 16, "--grad_accum 16"),
        (0.4, 6, "a smaller --model_size"),
        (0.1, 16, "a smaller --model_size"),
    ],
)
def test_the_advice_is_to_share_where_one_card_is_too_small(room_gb, rows, advice):
    gpus = 2 if room_gb > 0.6 else 4
    if rows == 16 and room_gb > 0.2:
        flags = f"train.py --shard --checkpoint_activations --batch_size 1 {advice}"
        advice = f"{gpus} such GPUs: torchrun --nproc_per_node {gpus} {flags}"
    settings = TrainSettings(batch_size=1, grad_accum=rows, seq_len=512)
    assert fitting_flags(settings, fake, int(room_gb * 1e9), shared) == advice


def test_shares_take_less_of_each_gpu():
    model = shape_of("xl")
    model.compute_dtype = torch.bfloat16
    settings = TrainSettings(batch_size=4, grad_accum=1, seq_len=1024)
    whole = predicted_memory(model, settings, 2)
    assert whole == predicted_memory(model, settings), "copies share nothing"
    halves, eighths = (predicted_memory(model, settings.replace(shard=True), shards) for shards in (2, 8))
    assert eighths < halves < whole
    state = 3 * 4 * model.num_params()
    assert halves - eighths == pytest.approx(state * (1 / 2 - 1 / 8), rel=0.1)


def test_the_advice_fits_a_card():
    model, room = shape_of("tiny"), 24 * 10**9

    def predicted(settings):
        return predicted_bytes(model, settings.batch_size, settings.seq_len, settings.checkpoint_activations)

    settings = TrainSettings(batch_size=256, grad_accum=2)
    assert predicted(settings) > room
    use = fitting_flags(settings, predicted, room)
    assert use == "--batch_size 128 --grad_accum 4 (the same step), or --checkpoint_activations"
    assert predicted(settings.replace(batch_size=128)) <= USABLE * room < predicted(settings)


def test_what_trains_the_exit_takes_memory():
    """Logits of more positions, and inputs of keys and values beside those of queries."""

    def predicted(**fields):
        model = shape_of("micro", **{f"router.{name}": value for name, value in fields.items()})
        return predicted_bytes(model, 64, 512, False)

    without = predicted()
    assert predicted(exit_stride=2) > without
    assert predicted(distil=False, expected=False) > without  # logits in fp32, and all at a time
    deep_layers, width = 4, 384
    assert predicted(served=0.75) - without == 2 * 64 * 512 * deep_layers * width
