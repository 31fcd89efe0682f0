"""A run trains in one process."""

from collections.abc import Mapping

from lepton.errors import InputError

LAUNCHED = (
    ("WORLD_SIZE", 2), ("RANK", 1), ("LOCAL_RANK", 1), ("LOCAL_WORLD_SIZE", 2), ("SLURM_STEP_NUM_TASKS", 2),
    ("OMPI_COMM_WORLD_SIZE", 2), ("PMI_SIZE", 2),
)  # fmt: skip
"""Variables that launchers set, and from which value on there are several processes. SLURM_NTASKS is not among them:
a batch script that asks for several tasks and starts one process has it, too."""


def refuse_several_processes(environment: Mapping[str, str]) -> None:
    """Raise InputError if a launcher (torchrun, srun, mpirun) has started this process as one of several.

    Each of them would run the same training, into the same folder.
    """
    for name, least in LAUNCHED:
        value = environment.get(name, "")
        if value.isdecimal() and int(value) >= least:
            raise InputError(
                f"{name}={value}: a launcher such as torchrun started several processes, and LEPTON trains in one "
                "process on one GPU so far; start it once, with python train.py"
            )
