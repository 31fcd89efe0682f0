"""Devices: choosing one, and what it can do (bf16, peak rate, memory). Importing this module queries none of them."""

import ctypes
import gc
import os
import platform
import re
import sys

import torch

from lepton.errors import InputError

PEAK_TFLOPS = (
    ("B300", 2500), ("B200", 2250), ("GB200", 2500), ("H200", 989), ("H100 PCIe", 756), ("H100", 989), ("GH200", 989),
    ("H800", 989), ("A100", 312), ("A800", 312), ("A40", 150), ("A30", 165), ("A10G", 70), ("A10", 125), ("L40S", 362),
    ("L40", 181), ("L4", 121), ("RTX PRO 6000", 504), ("RTX 6000 Ada", 364), ("RTX A6000", 155), ("RTX 5090", 210),
    ("RTX 5080", 113), ("RTX 5070 Ti", 88), ("RTX 5070", 62), ("RTX 4090", 165), ("RTX 4080", 97), ("RTX 4070 Ti", 80),
    ("RTX 4070", 58), ("RTX 4060", 30), ("RTX 3090", 71), ("RTX 3080", 60), ("RTX 3070", 41), ("RTX 3060", 26),
    ("MI300X", 1307), ("MI325X", 1307), ("MI250X", 191),
)  # fmt: skip
"""Dense bf16 peaks with fp32 accumulation, from the data sheets. The first entry in a card's name counts."""


def pick_device(name: str | None) -> torch.device:
    """Return the device called `name`, or by default a GPU where there is one, else the CPU.

    Raises:
        InputError: no such device here, or one that LEPTON does not run on.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type in ("cpu", "cuda"):
            torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises an AssertionError where it is built without CUDA
        raise InputError(f"device '{name}' cannot be used here ({str(error).splitlines()[0]})") from error
    if device.type == "mps":
        raise InputError(
            f"device '{name}' is not supported: Apple's GPUs have no 64-bit numbers, which LEPTON computes positions "
            "and samples with; use --device cpu"
        )
    if device.type not in ("cpu", "cuda"):
        raise InputError(
            f"device '{name}' is not supported: LEPTON runs on 'cpu' and 'cuda' (NVIDIA's and AMD's GPUs) alone"
        )
    return device


def has_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bf16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and _cpu_has_bf16()


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of activations for 'auto', 'bf16' or 'fp32'."""
    bf16 = name == "bf16" or (name == "auto" and has_bf16(device))
    return torch.bfloat16 if bf16 else torch.float32


def device_name(device: torch.device) -> str:
    """Return the device's name, such as 'NVIDIA H100 80GB HBM3' or 'CPU (2 threads)'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({threads} thread{'s' if threads > 1 else ''})" if device.type == "cpu" else str(device)


def peak_flops(device: torch.device) -> float | None:
    """Return the card's bf16 peak in FLOP/s, None if `PEAK_TFLOPS` lacks the card."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for card, tflops in PEAK_TFLOPS if re.search(rf"\b{card}\b", name)), None)


def peak_memory(device: torch.device) -> int | None:
    """Return the peak of the bytes that tensors held on the GPU so far, None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def free_unused_memory(device: torch.device) -> None:
    """Give memory that no tensor holds back to the GPU, and forget the peak so far."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def gpu_memory(device: torch.device) -> tuple[int, int] | None:
    """Return the bytes available to this process and the total bytes of the GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device), total


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work in its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def keep_freed_memory() -> bool:
    """Let the allocator keep freed memory, large blocks too. Return whether it does: only glibc can.

    Otherwise the large tensors of a training step are fresh pages in every step on a CPU, which took a third of its
    time (benchmarks/results/2026-11-22-train-speed-cpu.json).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # M_MMAP_MAX = 0 allocates no block by mmap; M_TRIM_THRESHOLD = -1 returns no memory to the system.
    return mallopt is not None and bool(mallopt(-4, 0)) and bool(mallopt(-1, -1))


def freeze_objects() -> None:
    """Let Python's garbage collector pass over all objects that exist now, until `gc.unfreeze()`.

    For a process of its own, such as a server, after `warm_up`: the compiler leaves about a million objects, and each
    full collection stops the process while it looks at them, for 0.2 to 3 s (docs/log.md, 2026-11-28). What is frozen
    and in a cycle is never freed, a model that is dropped later for instance.
    """
    gc.collect()
    gc.freeze()


def _cpu_has_bf16() -> bool:
    # torch has no public function for this. Without the private ones this returns False, which is slower but correct.
    if platform.machine().lower() in ("arm64", "aarch64"):
        return _arm_features_hold("bf16")
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check is not None)


def _arm_features_hold(feature: str) -> bool:
    if not os.path.exists("/proc/cpuinfo"):  # macOS, Windows: fp32 is the safe and fast choice there
        return False
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        return any(line.startswith("Features") and feature in line.split() for line in file)
