"""Metrics of a running process for Prometheus, under vLLM's names, and figures of its GPUs."""

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from itertools import count, takewhile
from typing import Any
from weakref import WeakKeyDictionary

from specdec.common.distribution import install

# Figure of a GPU -> NVML's function, the field of what it returns, and parts of it in a unit.
_NVML = {
    "power_watts": ("nvmlDeviceGetPowerUsage", "", 1000),
    "energy_joules": ("nvmlDeviceGetTotalEnergyConsumption", "", 1000),
    "memory_used_bytes": ("nvmlDeviceGetMemoryInfo", "used", 1),
    "memory_total_bytes": ("nvmlDeviceGetMemoryInfo", "total", 1),
    "utilization": ("nvmlDeviceGetUtilizationRates", "gpu", 100),
}


def read_gpu(gpu: int | str) -> dict[str, float]:
    """Read what NVML tells about a GPU, by index or UUID; nothing without nvidia-ml-py."""
    found: dict[str, float] = {}
    if not find_spec("pynvml"):
        return found
    import pynvml

    key = "UUID" if isinstance(gpu, str) else "Index"
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        handle = getattr(pynvml, f"nvmlDeviceGetHandleBy{key}")(gpu)
        for figure, (function, field, parts) in _NVML.items():
            with suppress(pynvml.NVMLError):
                value = getattr(pynvml, function)(handle)
                found[figure] = float(getattr(value, field) if field else value) / parts
    return found


class Metrics:
    """Counters, histograms and gauges, for `Engine.observer` or the `observer` of the proxy."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def make(kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
            return kind(f"specdec_{name}", text, labels, registry=self.registry, **options)

        # From 1 ms to 17 minutes.
        seconds = partial(make, Histogram, buckets=[0.001 * 2**power for power in range(21)])
        self.drafts = make(Counter, "spec_decode_num_drafts", "steps that verified a draft")
        self.drafted = make(Counter, "spec_decode_num_draft_tokens", "draft tokens verified")
        self.accepted = make(Counter, "spec_decode_num_accepted_tokens", "draft tokens accepted")
        per_pos = "spec_decode_num_accepted_tokens_per_pos"
        self.accepted_at = make(Counter, per_pos, "draft tokens accepted, by place", "position")
        self.generated = make(Counter, "generation_tokens", "tokens emitted")
        self.prompted = make(Counter, "prompt_tokens", "tokens of prompts")
        self.ended = make(Counter, "request_success", "requests that ended", "finished_reason")
        self.ttft = seconds("time_to_first_token_seconds", "from sending to the first token")
        self.itl = seconds("inter_token_latency_seconds", "from one step's tokens to the next's")
        self.e2e = seconds("e2e_request_latency_seconds", "from sending to the end")
        self.running = make(Gauge, "num_requests_running", "requests that run")
        self.waiting = make(Gauge, "num_requests_waiting", "requests that wait for a row")
        self.done = make(Gauge, "progress_done", "things that the command has done")
        self.total = make(Gauge, "progress_total", "things that it has to do, done ones included")
        self.registry.register(self)
        # Request of an engine -> tokens and records counted, and when its last tokens came.
        self._seen: WeakKeyDictionary[Any, tuple[int, int, float]] = WeakKeyDictionary()

    def collect(self) -> Iterator[Any]:
        """Tell the figures of all GPUs of the machine, as Prometheus asks for them."""
        from prometheus_client.metrics_core import GaugeMetricFamily

        gpus = list(takewhile(bool, map(read_gpu, count())))
        for figure in _NVML:
            family = GaugeMetricFamily(f"specdec_gpu_{figure}", "told by NVML", labels=["gpu"])
            for index, figures in enumerate(gpus):
                if figure in figures:
                    family.add_metric([str(index)], figures[figure])
            yield family

    def observe(self, engine: Any, requests: Sequence[Any]) -> None:
        """Count a step of an engine: requests with new tokens, and those that have ended."""
        self.running.set(engine.num_running)
        self.waiting.set(engine.num_waiting)
        drafts: list[Any] = []
        for request in requests:
            num_tokens, num_records, last = self._seen.get(request, (0, 0, 0.0))
            new = len(request.tokens) - num_tokens
            self.generated.inc(new)
            if new and num_tokens:
                self.itl.observe(request.last_token - last)
            elif new:
                self.prompted.inc(len(request.prompt))
                self.ttft.observe(request.first_token - request.submitted)
            # As in vLLM, a step without a draft is none.
            drafts += [each for each in request.records[num_records:] if each.num_drafted]
            self._seen[request] = len(request.tokens), len(request.records), request.last_token
            if request.finish_reason:
                self.ended.labels(request.finish_reason).inc()
                self.e2e.observe(time.perf_counter() - request.submitted)
        self.drafts.inc(len(drafts))
        self.drafted.inc(sum(each.num_drafted for each in drafts))
        self.accepted.inc(sum(each.num_accepted for each in drafts))
        for place in range(max((each.depth_tested for each in drafts), default=0)):
            self.accepted_at.labels(place).inc(sum(each.num_accepted > place for each in drafts))

    def observe_exchange(self, record: Any) -> None:
        """Count a recorded exchange of the proxy, tokens as its server's `usage` tells them."""
        response = record.response or {}
        usage, choices = response.get("usage") or {}, response.get("choices") or [{}]
        self.prompted.inc(usage.get("prompt_tokens") or 0)
        self.generated.inc(usage.get("completion_tokens") or 0)
        if record.ttft_s is not None:
            self.ttft.observe(record.ttft_s)
        reason = choices[0].get("finish_reason") if record.complete else "abort"
        self.ended.labels(reason or "error").inc()
        self.e2e.observe(record.latency_s)


def serve_metrics(port: int) -> tuple[Metrics, int]:
    """Show metrics at this port of the loopback address, 0 for a free one, and return both."""
    if not find_spec("prometheus_client"):
        fix = f"install with: {install('metrics')}"
        raise ValueError(f"--metrics-port needs prometheus_client; {fix}")
    from prometheus_client import start_http_server

    metrics = Metrics()
    try:
        server, _ = start_http_server(port, "127.0.0.1", metrics.registry)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--metrics-port {port}: {error}; give a free port, or 0") from error
    return metrics, server.server_port
