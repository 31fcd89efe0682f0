import gc
import io
import platform
import sys
import weakref

import pytest
import torch

from lepton.errors import InputError
from lepton.runtime import device

CPU = torch.device("cpu")


def test_frozen_objects_are_passed_over_and_garbage_goes_before():
    class Thing:
        pass

    garbage = Thing()
    garbage.itself, gone = garbage, weakref.ref(garbage)
    kept = [Thing() for _ in range(100)]
    del garbage
    device.freeze_objects()
    try:
        assert gone() is None
        watched = {id(each) for each in gc.get_objects()}
        assert not any(id(each) in watched for each in kept)
        assert gc.get_freeze_count() > 100
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta:x"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(InputError, match=f"device '{name}' cannot be used here"):
        device.pick_device(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mps", "device 'mps' is not supported: Apple's GPUs have no 64-bit numbers, .*; use --device cpu"),
        ("meta", "device 'meta' is not supported: LEPTON runs on 'cpu' and 'cuda'"),
        ("xpu", "device 'xpu' is not supported"),
    ],
)
def test_a_device_that_lepton_does_not_run_on(name, message):
    with pytest.raises(InputError, match=message):
        device.pick_device(name)


def test_the_cpu_is_always_there(monkeypatch):
    assert device.pick_device("cpu") == CPU
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert device.pick_device(None) == CPU
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert device.pick_device(None) == torch.device("cuda")


@pytest.mark.parametrize("machine", ["x86_64", "arm64"])
def test_bf16_where_the_hardware_has_it(monkeypatch, machine):
    monkeypatch.setattr("platform.machine", lambda: machine)
    for has in (True, False):
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda has=has: has)
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
        cpuinfo = f"processor : 0\nFeatures : fp asimd{' bf16' if has else ''}\n"
        with monkeypatch.context() as patch:
            patch.setattr("os.path.exists", lambda path: True)
            patch.setattr("builtins.open", lambda path, cpuinfo=cpuinfo, **_: io.StringIO(cpuinfo))
            assert device.has_bf16(CPU) == has
            assert device.pick_dtype("auto", CPU) == (torch.bfloat16 if has else torch.float32)
        assert device.pick_dtype("fp32", CPU) == torch.float32
        assert device.pick_dtype("bf16", CPU) == torch.bfloat16


def test_a_torch_without_the_questions_has_no_bf16(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "AMD64")
    monkeypatch.delattr("torch.cpu._is_avx512_bf16_supported", raising=False)
    monkeypatch.delattr("torch.cpu._is_amx_tile_supported", raising=False)
    assert not device.has_bf16(CPU)


@pytest.mark.parametrize(
    ("card", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 80),
        ("NVIDIA RTX A4000", None),
    ],
)
def test_peaks_of_cards(monkeypatch, card, tflops):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: card)
    peak = device.peak_flops(torch.device("cuda"))
    assert peak == (tflops and tflops * 1e12)


def test_a_cpu_has_neither_peak_nor_memory():
    assert device.peak_flops(CPU) is None
    assert device.peak_memory(CPU) is None
    assert "1 thread" in device.device_name(CPU)


def test_freed_memory_is_kept_where_the_c_library_can(monkeypatch):
    assert device.keep_freed_memory() == (sys.platform == "linux" and platform.libc_ver()[0] == "glibc")
    monkeypatch.setattr("sys.platform", "win32")
    assert not device.keep_freed_memory()


def test_unused_memory_goes_back_to_a_gpu_alone(monkeypatch):
    called = []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: called.append("empty"))
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: called.append(device))
    device.free_unused_memory(CPU)
    assert called == []
    device.free_unused_memory(torch.device("cuda", 1))
    assert called == ["empty", torch.device("cuda", 1)]
