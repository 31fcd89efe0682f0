import errno
import io
import itertools
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from lepton import checkpoint
from lepton.api import Lepton
from lepton.errors import InputError
from lepton.train import trainer
from lepton.train.micro_step import MicroStep
from lepton.train.saving import Saving
from lepton.train.stop_request import Interrupted
from tests.streams import Watched
from tests.train.small import ROUTED, SHAPE, losses_of, metrics_of, small_run, small_settings, write_data


def files_of(out):
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder and the output of a run of 8 steps."""
    out = tmp_path_factory.mktemp("finished") / "out"
    _, text = small_run(data, out)
    return out, text


def test_enough_held_out_text_calibrates(finished, tmp_path):
    data = write_data(tmp_path / "data")
    (data / "val").mkdir()
    (data / "shard_00001.npy").rename(data / "val" / "shard_00000.npy")
    small_run(data, tmp_path / "out", max_steps=1)
    state = torch.load(tmp_path / "out" / "final.pt")["model"]
    assert state["uncertainty.calibration"].tolist() != [1, 0]
    initial = torch.load(finished[0] / "final.pt")["model"]  # of too little text
    assert not torch.equal(state["router.quantiles"], initial["router.quantiles"])


def test_a_run_leaves_its_files(finished):
    out, _ = finished
    assert files_of(out) == ["best.pt", "final.pt", "metrics.jsonl", "step_4.pt", "step_8.pt"]
    final = torch.load(out / "final.pt")
    assert (final["step"], final["size"], final["training"]["lr"]) == (8, "nano", 6e-4)
    model = Lepton.from_checkpoint(out / "final.pt")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in final["model"].items())
    assert {tensor.dtype for name, tensor in final["model"].items() if name != "drafter.ids"} == {torch.float32}
    assert final["model"]["drafter.ids"].tolist() != list(range(64)), "the drafter proposes what the data holds"
    assert final["model"]["router.quantiles"].diff().min() >= 0
    # 64 held-out tokens are too few: fitted to them it would be worse than as it is.
    assert final["model"]["uncertainty.calibration"].tolist() == [1, 0]


def test_the_metrics_tell_each_step_and_validation_once(finished):
    out, _ = finished
    entries = metrics_of(out)
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, 9))
    assert [entry["step"] for entry in entries if "val_loss" in entry] == [0, 4, 8]
    train, validation, last = entries[1], entries[0], entries[-1]
    assert {"step", "loss", "lr", "grad_norm"} <= train.keys()
    ideas = {"mean_depth", "tokens_per_step", "calibration_error"}
    assert {"step", "val_loss", "val_bpb"} == validation.keys(), "there is nothing to say about untrained ideas"
    assert {"step", "val_loss", "val_bpb", *ideas} == last.keys()
    assert validation["val_loss"] == pytest.approx(np.log(300), rel=0.02)
    assert last["val_loss"] < validation["val_loss"] - 0.3


def test_the_output_begins_and_ends_as_promised(finished):
    out, text = finished
    lines = text.splitlines()
    assert lines[0].startswith("nano: 0.0 M parameters; 64 tokens per step; ")
    assert "8 steps in about" in lines[0]
    assert lines[1] == "on a CPU: --grad_accum 1 instead of 16, not compiled; explicit flags win"
    assert [line.split()[1] for line in lines if "tokens/s" in line] == ["2/8", "4/8", "6/8", "8/8"]
    assert "sample at step 8:" in lines
    (last,) = [line for line in lines if line.startswith("step 8: validation loss")]
    assert lines.index(last) < lines.index("sample at step 8:"), "shown once"
    assert lines[2].startswith("prepared in ")
    assert re.fullmatch(r"took [\d,]+ s(: \D+ \d+(, \D+ \d+)*)?", lines[-2])
    assert lines[-1] == f"checkpoint: {out / 'final.pt'}"


def test_the_seconds_count_from_where_the_command_began(data, tmp_path):
    began = time.perf_counter() - 5000
    trainer.train(small_settings(data, tmp_path, max_steps=1), stream=(stream := io.StringIO()), since=began)
    assert re.search(r"^prepared in 5,\d\d\d s: start 5,\d\d\d\b", stream.getvalue(), re.MULTILINE)
    assert re.search(r"^took 5,\d\d\d s: preparation 5,\d\d\d\b", stream.getvalue(), re.MULTILINE)


def test_a_run_is_repeatable_and_the_seed_counts(data, finished, tmp_path):
    small_run(data, tmp_path / "same")
    small_run(data, tmp_path / "other", seed=1, max_steps=2)
    assert metrics_of(tmp_path / "same") == metrics_of(finished[0])
    assert losses_of(tmp_path / "other")[0] != losses_of(finished[0])[0]


def test_the_largest_seed_trains_validates_samples_and_resumes(data, tmp_path):
    small_run(data, tmp_path, seed=2**64 - 1, max_steps=2, sample_every=1)
    small_run(data, tmp_path, seed=2**64 - 1, max_steps=3, resume="auto")
    assert [step for step, _ in losses_of(tmp_path)] == [1, 2, 3]


def test_bad_lines_in_the_metrics_are_said_once_and_kept(data, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], "oops\n", '{"loss": 1.0}\n', *lines[2:]]))
    _, text = small_run(data, tmp_path, resume="auto")
    assert f"{path}: 2 lines without a step, moved to metrics.jsonl.bad\n" in text
    assert metrics_of(tmp_path) == metrics_of(finished[0])
    assert (tmp_path / "metrics.jsonl.bad").read_text() == 'oops\n{"loss": 1.0}\n'
    assert "metrics.jsonl" not in small_run(data, tmp_path, resume="auto")[1]


def test_accumulated_micro_batches_equal_one_batch(data, tmp_path):
    changes = {"seq_len": 50, "optimizer": "adamw", "max_steps": 4}
    for name, batch_size, grad_accum in (("one", 8, 1), ("four", 2, 4)):
        small_run(data, tmp_path / name, batch_size=batch_size, grad_accum=grad_accum, **changes)
    ours, theirs = losses_of(tmp_path / "one"), losses_of(tmp_path / "four")
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in theirs], rel=1e-4)
    assert ours[0][1] == pytest.approx(theirs[0][1], rel=1e-6), "windows of 50, 50 and 28 targets weigh what they hold"


@pytest.mark.parametrize(
    "changes",
    [{}, {"optimizer": "adamw"}, {"dtype": "bf16"}, {"grad_accum": 2}, {"overrides": SHAPE | ROUTED}],
    ids=lambda changes: "routed" if "overrides" in changes else str(changes),
)
def test_resuming_repeats_the_undisturbed_run(data, finished, tmp_path, changes):
    if changes:
        small_run(data, tmp_path / "whole", **changes)
    else:
        shutil.copytree(finished[0], tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for name in ("final.pt", "step_8.pt"):
        (tmp_path / "parts" / name).unlink()
    _, text = small_run(data, tmp_path / "parts", resume="auto", **changes)
    assert "resuming" in text
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")
    ours, theirs = (checkpoint.load(tmp_path / name / "final.pt") for name in ("parts", "whole"))
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in ours["model"])
    assert ours["validation"] == theirs["validation"]
    assert ours["best"] == theirs["best"]


def test_the_losses_know_the_share_of_the_peak_rate(data, tmp_path, monkeypatch):
    rates = []

    class Noting(MicroStep):
        def __call__(self, *given):
            rates.append(given[-1].rate)
            super().__call__(*given)

    monkeypatch.setattr(trainer, "MicroStep", Noting)
    small_run(data, tmp_path, grad_accum=2)
    logged = [entry["lr"] for entry in metrics_of(tmp_path) if "loss" in entry]
    peak = small_settings(data, tmp_path).lr
    trained = rates[-2 * 8 :]
    assert trained[::2] == trained[1::2]
    assert trained[1::2] == pytest.approx([lr / peak for lr in logged])
    assert len({*trained}) > 2


def test_a_run_goes_on_with_more_steps(data, tmp_path):
    small_run(data, tmp_path, max_steps=4)
    small_run(data, tmp_path, resume="auto", max_steps=8)
    assert [step for step, _ in losses_of(tmp_path)] == list(range(1, 9))
    assert checkpoint.load(tmp_path / "final.pt")["step"] == 8
    assert not (tmp_path / "previous-1").exists()


def test_resuming_a_finished_run_only_ends_it_again(data, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    before = metrics_of(tmp_path)
    (tmp_path / "final.pt").unlink()
    _, text = small_run(data, tmp_path, resume="auto")
    assert metrics_of(tmp_path) == before
    assert checkpoint.load(tmp_path / "final.pt")["step"] == 8
    assert "sample at step 8" in text


def test_another_optimizer_starts_without_momentum(data, tmp_path):
    small_run(data, tmp_path, max_steps=4)
    _, text = small_run(data, tmp_path, resume="auto", max_steps=8, optimizer="adamw")
    assert "adamw starts without the momentum of muon" in text
    assert checkpoint.load(tmp_path / "final.pt")["optimizer"]["kind"] == "adamw"


def test_a_fresh_run_in_a_used_folder_moves_the_old_one_aside(data, tmp_path):
    small_run(data, tmp_path, max_steps=4)
    _, text = small_run(data, tmp_path, max_steps=2, seed=5)
    assert f"{tmp_path} held an earlier run, which is now in {tmp_path / 'previous-1'}; --resume auto" in text
    assert checkpoint.load(tmp_path / "previous-1" / "final.pt")["step"] == 4
    assert [step for step, _ in losses_of(tmp_path)] == [1, 2]


def test_going_back_keeps_what_came_after(data, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    small_run(data, tmp_path, resume=str(tmp_path / "step_4.pt"), lr=1e-3, max_steps=6)
    assert checkpoint.load(tmp_path / "previous-1" / "step_8.pt")["step"] == 8
    assert [step for step, _ in losses_of(tmp_path / "previous-1")] == list(range(1, 9))
    assert [step for step, _ in losses_of(tmp_path)] == list(range(1, 7))
    assert "step_8.pt" not in files_of(tmp_path)


def test_resuming_into_another_folder_leaves_the_first_alone(data, finished, tmp_path):
    before = files_of(finished[0])
    small_run(data, tmp_path / "fork", resume=str(finished[0] / "step_4.pt"), checkpoint_dir=str(tmp_path / "fork"))
    assert files_of(finished[0]) == before
    assert [step for step, _ in losses_of(tmp_path / "fork")] == [5, 6, 7, 8]
    assert losses_of(tmp_path / "fork") == losses_of(finished[0])[4:]


def test_initial_weights_begin_a_new_run(data, finished, tmp_path):
    small_run(data, tmp_path, init_from=str(finished[0] / "final.pt"), model_size=None, overrides={}, max_steps=1)
    ours, theirs = metrics_of(tmp_path)[0], metrics_of(finished[0])[-1]
    assert ours["step"] == 0
    assert ours["val_loss"] == theirs["val_loss"]
    with pytest.raises(InputError, match="weights do not fit this shape: size mismatch"):
        small_run(data, tmp_path, init_from=str(finished[0] / "final.pt"), model_size=None, overrides={"ffn": 64})


def test_checkpoints_are_kept_and_pruned(data, tmp_path):
    small_run(data, tmp_path, save_every=1, keep=2, eval_every=3)
    assert files_of(tmp_path) == ["best.pt", "final.pt", "metrics.jsonl", "step_7.pt", "step_8.pt"]


def test_the_best_is_that_of_the_validations(data, tmp_path, monkeypatch):
    losses = iter([9.0, 5.0, 3.0, 4.0, 3.5])
    monkeypatch.setattr(trainer, "validation_loss", lambda *args, **options: (next(losses), 1.0))
    small_run(data, tmp_path, eval_every=2)
    assert checkpoint.load(tmp_path / "best.pt")["step"] == 4
    assert checkpoint.load(tmp_path / "final.pt")["best"] == 3.0


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP" if hasattr(signal, "SIGHUP") else "SIGTERM"])
def test_a_signal_saves_the_step_and_resuming_is_exact(data, finished, tmp_path, name):
    stream = Watched("step 3/8", lambda: signal.raise_signal(getattr(signal, name)))
    with pytest.raises(Interrupted, match=r"stopped at step 3, saved .*step_3\.pt; go on with --resume .*step_3\.pt"):
        trainer.train(small_settings(data, tmp_path, log_every=1), stream=stream)
    assert files_of(tmp_path) == ["metrics.jsonl", "step_3.pt"]
    small_run(data, tmp_path, resume="auto")
    assert metrics_of(tmp_path) == metrics_of(finished[0])


def test_a_loss_that_is_not_finite_stops_before_anything_is_overwritten(data, tmp_path):
    steps = itertools.count(1)

    def poison(optimizer, args, options):
        if isinstance(optimizer, torch.optim.AdamW) and next(steps) == 5:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.data[:] = float("nan")

    hook = register_optimizer_step_post_hook(poison)
    with pytest.raises(InputError, match="loss is nan at step 6; nothing was saved after that"):
        small_run(data, tmp_path, save_every=2, eval_every=2, log_every=100)
    hook.remove()
    assert [step for step, _ in losses_of(tmp_path)] == list(range(1, 6))
    for name in ("step_2.pt", "step_4.pt", "best.pt"):
        content = checkpoint.load(tmp_path / name)
        assert all(tensor.isfinite().all() for tensor in content["model"].values())


def test_a_full_disk_leaves_the_earlier_checkpoints(data, tmp_path, monkeypatch):
    replace = os.replace

    def full(unfinished, path):
        if Path(path).name == "step_8.pt":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(unfinished, path)

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(InputError, match=r"cannot save .*step_8\.pt: No space left"):
        small_run(data, tmp_path)
    assert checkpoint.load(tmp_path / "step_4.pt")["step"] == 4
    assert not list(tmp_path.glob("*.tmp"))


def test_text_samples_come_regularly(data, tmp_path):
    _, text = small_run(data, tmp_path, sample_every=3, sample_prompt="The quick")
    places = [line for line in text.splitlines() if line.startswith("sample at")]
    assert places == ["sample at step 3:", "sample at step 6:", "sample at step 8:"]
    assert text.count("| The quick") == 3


def test_data_that_does_not_fit_is_refused(data, tmp_path):
    with pytest.raises(InputError, match="seq_len=200"):
        small_run(data, tmp_path / "out", seq_len=200)
    with pytest.raises(InputError, match=r"no such folder: .*nothing"):
        small_run(data, tmp_path / "out", data_dir=str(tmp_path / "nothing"))
    other = write_data(tmp_path / "other", hashed=False)
    bad = np.load(other / "shard_00000.npy")
    bad[:] = 300
    np.save(other / "shard_00000.npy", bad)
    with pytest.raises(InputError, match=r"shard_00000\.npy: token id 300"):
        small_run(other, tmp_path / "out")
    metadata = json.loads((data / "metadata.json").read_text()) | {"tokenizer_hash": "0" * 64}
    (other / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(InputError, match="another tokenizer"):
        small_run(other, tmp_path / "out")


@pytest.mark.parametrize(
    ("batch_size", "said", "use"),
    [(64, 64, "--batch_size 32 --grad_accum 4"), (None, 8, "--batch_size 4 --grad_accum 2")],
)
def test_an_out_of_memory_gpu_gets_advice(data, tmp_path, monkeypatch, batch_size, said, use):
    def full(self, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (10**9, 24 * 10**9))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 10**9)
    monkeypatch.setattr("torch.nn.Module.to", full)
    with pytest.raises(InputError) as error:
        small_run(data, tmp_path, device=None, batch_size=batch_size, grad_accum=2)
    assert str(error.value) == (
        f"out of GPU memory with --batch_size {said} on 24 GB: use {use} (the same step), or --checkpoint_activations"
    )


def test_saving_beside_the_steps_saves_the_same(data, finished, tmp_path, monkeypatch):
    """As on a GPU, also where the last step was saved as the run is stopped."""
    monkeypatch.setattr(trainer, "Saving", lambda folder, *, beside, say: Saving(folder, beside=True, say=say))
    stream = Watched("step 6/8", lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted, match="stopped at step 6"):
        trainer.train(small_settings(data, tmp_path), stream=stream)
    assert checkpoint.is_whole(tmp_path / "step_6.pt")
    small_run(data, tmp_path, resume="auto")
    assert metrics_of(tmp_path) == metrics_of(finished[0])
    ours, theirs = (checkpoint.load(out / "step_4.pt")["model"] for out in (tmp_path, finished[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_faster_split_is_told(data, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "faster_split", lambda model, settings, micro_step, steps: f"{steps} steps: faster")
    _, text = small_run(data, tmp_path, max_steps=2)
    lines = text.splitlines()
    assert lines[lines.index("2 steps: faster") + 1].startswith("prepared in ")


def test_blocks_computed_twice_train_alike(data, finished, tmp_path):
    small_run(data, tmp_path, checkpoint_activations=True)
    assert losses_of(tmp_path) == losses_of(finished[0])
    assert checkpoint.load(tmp_path / "final.pt")["training"]["checkpoint_activations"]


def test_a_mistake_touches_nothing_of_an_earlier_run(data, tmp_path):
    small_run(data, tmp_path, max_steps=2)
    before = files_of(tmp_path)
    with pytest.raises(InputError):
        small_run(data, tmp_path, data_dir=str(tmp_path / "nothing"))
    assert files_of(tmp_path) == before


def test_a_cpu_does_not_compile(data, tmp_path):
    with pytest.raises(InputError, match=r"--compile: .* gradients wrong .*; leave it out"):
        small_run(data, tmp_path, compile=True)


def test_explicit_settings_win_on_a_cpu(data, tmp_path):
    _, text = small_run(data, tmp_path, grad_accum=3, compile=False, threads=1, max_steps=1)
    assert "192 tokens per step" in text
    assert "on a CPU" not in text
    assert small_settings(data, tmp_path).grad_accum is None
