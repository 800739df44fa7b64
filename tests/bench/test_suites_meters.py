"""What is read of power and memory, and that nothing is told where nothing can be read."""

import sys
from types import SimpleNamespace

import pytest
import torch

from specdec.bench import measure as memory
from specdec.bench.measure import MemoryWatch, PowerMeter
from specdec.bench.store import Memory
from specdec.bench.suites.store import Power
from specdec.targets.load import peak_rss_bytes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class NVMLError(Exception):
    pass


def fake_nvml(monkeypatch, energy_mj=(), power_mw=(), has_device=True):
    """A pynvml that tells these numbers one after the other, and then fails."""

    def next_of(values):
        remaining = iter(values)

        def read(handle):
            assert handle == "handle of GPU-1234"
            try:
                return next(remaining)
            except StopIteration:
                raise NVMLError("not supported") from None

        return read

    def handle(uuid):
        if not has_device:
            raise NVMLError("not found")
        return f"handle of {uuid}"

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=next_of(energy_mj),
        nvmlDeviceGetPowerUsage=next_of(power_mw),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    properties = SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr("specdec.bench.measure.time", clock)
    return clock


def test_energy_is_the_difference_of_the_counter_in_joules(monkeypatch, clock):
    # One reading to see whether there is a counter, one at creation, one at each start and stop.
    fake_nvml(monkeypatch, energy_mj=[1000, 1000, 5000, 25_000])
    meter = PowerMeter(CUDA)
    assert meter.is_measuring
    meter.start()
    clock.now += 4
    meter.look()
    assert meter.stop() == Power(energy_j=20.0, power_w=5.0)


def test_without_a_counter_power_is_summed_up_between_looks(monkeypatch, clock):
    fake_nvml(monkeypatch, power_mw=[0, 100_000, 200_000, 50_000])
    meter = PowerMeter(CUDA)
    meter.start()
    clock.now += 2
    meter.look()
    clock.now += 1
    # (100 + 200) / 2 W for 2 s, then (200 + 50) / 2 W for 1 s.
    assert meter.stop() == Power(energy_j=425.0, power_w=pytest.approx(425 / 3))


@pytest.mark.parametrize("has_device", [True, False])
def test_a_device_that_tells_nothing_is_not_measured(monkeypatch, clock, has_device):
    fake_nvml(monkeypatch, has_device=has_device)
    meter = PowerMeter(CUDA)
    assert not meter.is_measuring
    clock.now += 1
    meter.look()
    assert meter.stop() == Power(None, None)


def test_without_nvml_or_without_a_gpu_nothing_is_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    assert PowerMeter(CUDA).stop() == Power(None, None)
    assert PowerMeter(CPU).stop() == Power(None, None)


@pytest.mark.skipif(not memory._RESET.exists(), reason="only Linux lets a peak be set back")
def test_the_process_s_peak_is_the_call_s_own():
    before = MemoryWatch(CPU)
    torch.ones(50_000_000)  # 200 MB, gone at once
    large = before.memory(0).peak_rss_bytes
    small = MemoryWatch(CPU).memory(0).peak_rss_bytes
    assert small < large - 100e6


def test_where_the_kernel_tells_no_peak_the_process_s_own_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_RESET", tmp_path / "none" / "clear_refs")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none" / "status")
    assert MemoryWatch(CPU).memory(7) == Memory(peak_rss_bytes(), None, 7)
