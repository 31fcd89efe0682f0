import pytest

from lepton.errors import InputError
from lepton.train.single_process import refuse_several_processes


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
def test_one_of_several_processes_is_refused(several):
    with pytest.raises(InputError, match=r"started several processes, and LEPTON trains in one process"):
        refuse_several_processes(several)


@pytest.mark.parametrize(
    "single",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script that starts one process
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"WORLD_SIZE": "", "RANK": "first"},
    ],
)
def test_a_single_process_is_not(single):
    refuse_several_processes(single)
