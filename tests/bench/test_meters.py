"""Meters of power and memory, which tell nothing where nothing can be read."""

import sys
from types import SimpleNamespace

import pytest
import torch

from specdec.bench import measure
from specdec.bench.measure import PowerMeter, read_peaks, reset_peaks

NOTHING = dict.fromkeys(["energy_j", "gpu_busy_s", "gpu_memory_bytes"])
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


NVML = ("TotalEnergyConsumption", "PowerUsage", "UtilizationRates", "MemoryInfo")


class NVMLError(Exception):
    pass


@pytest.fixture
def meter(monkeypatch):
    """A meter whose functions of NVML tell these numbers one after the other, and then fail."""

    def make(has_device=True, **told):
        def handle(uuid):
            if not has_device:
                raise NVMLError("not found")
            return f"handle of {uuid}"

        def reader(numbers):
            def read(handle):
                assert handle == "handle of GPU-1234"
                for number in numbers:
                    return number
                raise NVMLError("not supported")

            return read

        functions = [f"nvmlDeviceGet{name}" for name in NVML]
        nvml = SimpleNamespace(
            __spec__=True,
            NVMLError=NVMLError,
            nvmlInit=lambda: None,
            nvmlDeviceGetHandleByUUID=handle,
            **{name: reader(iter(told.get(name[13:], ()))) for name in functions},
        )
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        properties = SimpleNamespace(uuid="1234")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return PowerMeter(CUDA)

    return make


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    clock.perf_counter = lambda: clock.now
    clock.process_time = lambda: clock.now / 2
    monkeypatch.setattr("specdec.bench.measure.time", clock)
    return clock


@pytest.mark.parametrize(
    ("told", "joules"),
    [
        ({"TotalEnergyConsumption": [5000, 9000, 25_000]}, 20.0),
        # (100 + 200) / 2 W for 2 s, then (200 + 50) / 2 W for 1 s.
        ({"PowerUsage": [100_000, 200_000, 50_000]}, 425.0),
        ({}, None),
        ({"has_device": False}, None),
    ],
)
def test_energy_is_the_counter_s_difference_or_power_summed(meter, clock, told, joules):
    found = meter(**told)
    found.start()
    clock.now += 2
    found.look()
    clock.now += 1
    assert found.stop() == {**NOTHING, "energy_j": joules, "cpu_s": 1.5}


def test_utilization_is_averaged_and_memory_is_the_largest_of_looks_that_are_not_too_close(
    meter, clock
):
    busy = [SimpleNamespace(gpu=percent) for percent in (0, 100, 40)]
    used = [SimpleNamespace(used=size, total=10) for size in (5, 5, 9, 9, 7, 7)]  # asked for twice
    found = meter(UtilizationRates=busy, MemoryInfo=used)
    found.start()
    for passed_s in (0.05, 1.95, 0.05):
        clock.now += passed_s
        found.look()  # the second alone is not too close to the one before
    clock.now += 0.95
    told = found.stop()
    assert told == {**NOTHING, "gpu_busy_s": pytest.approx(1.0 + 0.7), "cpu_s": 1.5} | {
        "gpu_memory_bytes": 9.0
    }


def test_nothing_is_measured_without_nvml_or_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    for device in (CUDA, CPU):
        meter = PowerMeter(device)
        meter.start()
        assert meter.stop() == {**NOTHING, "cpu_s": pytest.approx(0, abs=60)}


@pytest.mark.skipif(not measure._RESET.exists(), reason="only Linux lets a peak be set back")
def test_peak_is_the_call_s_own():
    peaks = []
    for size in (50_000_000, 1):  # 200 MB, gone at once
        reset_peaks(CPU)
        torch.ones(size)
        peaks.append(read_peaks(CPU, 0).peak_rss_bytes)
    assert peaks[1] < peaks[0] - 100e6


def test_peak_is_the_process_s_where_no_other_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "_RESET", tmp_path / "none" / "clear_refs")
    monkeypatch.setattr(measure, "_STATUS", tmp_path / "none" / "status")
    assert read_peaks(CPU, 7).peak_rss_bytes > 100e6
