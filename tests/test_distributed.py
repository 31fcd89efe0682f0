import os
import signal

import pytest
import torch

from lepton.distributed import RankLost, Ranks, device_of, joined, ranks_of, restarted
from lepton.errors import InputError
from tests.processes import Processes, in_ranks, with_ranks

TORCHRUN = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1",
}  # fmt: skip


@pytest.mark.parametrize(
    "several",
    [
        {"WORLD_SIZE": "2", "RANK": "0"},
        {"RANK": "1"},
        {"LOCAL_RANK": "3"},
        {"SLURM_STEP_NUM_TASKS": "4"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"PMI_SIZE": "8"},
    ],
)
def test_one_of_several_processes_of_another_launcher_is_refused(several):
    with pytest.raises(InputError, match=r"a launcher other than torchrun started several processes; start them with"):
        ranks_of(several)


@pytest.mark.parametrize(
    "single",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script that starts one process
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"WORLD_SIZE": "", "RANK": "first"},
        {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"},
    ],
)
def test_a_single_process_is_not(single):
    ranks = ranks_of(single)
    assert ranks.leads
    assert not ranks.several


def test_a_process_of_torchrun_knows_its_place():
    assert ranks_of(TORCHRUN) == Ranks(1, 2, 1, 2)
    assert not ranks_of(TORCHRUN).leads
    assert not restarted(TORCHRUN)
    assert restarted(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "1"})


def test_alone_everything_is_ones_own():
    ranks = Ranks()
    numbers = torch.ones(3)
    ranks.add_([numbers])
    ranks.copy_([numbers])
    assert numbers.tolist() == [1, 1, 1]
    assert (ranks.total(3), ranks.largest(4), ranks.told("x"), list(ranks.share(3))) == (3, 4, "x", [0, 1, 2])
    with pytest.raises(RuntimeError, match="gloo"), ranks.watched():
        raise RuntimeError("gloo: nobody is there")


@pytest.mark.parametrize("name", ["cuda:1", "mps"])
def test_several_processes_do_not_share_a_device(name):
    with pytest.raises(InputError, match=f"--device {name} with 2 processes"):
        device_of(Ranks(1, 2, 1, 2), name)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert device_of(Ranks(0, 2, 0, 2), None) == 0
    assert device_of(Ranks(1, 2, 1, 2), "cpu") is None
    with pytest.raises(InputError, match="2 processes on a host with 1 GPUs: start torchrun --nproc_per_node 1"):
        device_of(Ranks(1, 2, 1, 2), None)


def talk(ranks):
    numbers, others = torch.tensor([1.0, ranks.rank]), torch.tensor([ranks.rank])
    ranks.add_([numbers])
    ranks.copy_([others])
    ranks.wait()
    told = ranks.told({"said": ranks.rank})
    return numbers.tolist(), others.tolist(), ranks.total(3 + ranks.rank), ranks.largest(ranks.rank), told


def test_processes_tell_each_other_numbers_and_values(tmp_path):
    assert in_ranks(tmp_path, talk) == [([2.0, 1.0], [0], 7, 1, {"said": 0})] * 2
    assert not torch.distributed.is_initialized()


def fail_or_die(ranks, how):
    if ranks.rank == 1:
        if how == "raise":
            raise InputError("the disk is full")
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.wait()


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [("raise", 99, "rank 1 failed: the disk is full"), ("die", -signal.SIGKILL, "rank 1 is gone: killed")],
)
def test_the_others_learn_which_process_has_failed(tmp_path, how, code, said):
    processes = Processes(tmp_path, with_ranks, fail_or_die, how)
    assert processes.wait() == [99, code]
    assert f"RankLost: {said}" in processes.said(0)


def test_a_mistake_of_ones_own_is_not_the_others(tmp_path):
    with pytest.raises(RuntimeError, match="shape"), Ranks(0, 2).watched():
        raise RuntimeError("a shape does not fit")
    assert not issubclass(RankLost, InputError)
    with joined({}, None) as ranks:
        assert ranks == Ranks()
