"""Metrics, and dashboard and alerts on them, held against a real Prometheus that scrapes a run."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from engine_cases import PROMPTS, run
from prometheus_client import REGISTRY, start_http_server
from tiny_models import tiny_target
from typer.testing import CliRunner

from specdec import Engine
from specdec.cli import app
from specdec.common.metrics import Metrics
from specdec.engine.metrics import AcceptanceStats

ROOT = Path(__file__).parents[1]
DASHBOARDS = ROOT / "dashboards"
PANELS = json.loads((DASHBOARDS / "grafana.json").read_text())["panels"]
QUERIES = [each["expr"] for panel in PANELS for each in panel.get("targets", ())]
RULES = yaml.safe_load((DASHBOARDS / "alerts.yml").read_text())["groups"][0]["rules"]
SPEC = "specdec_spec_decode_num"
BENCH = [sys.executable, "-m", "specdec", "bench", "demo"]
REQUIRED = "SPECDEC_REQUIRE_PROMETHEUS"
PATIENCE_S = 200  # a limit for a test that hangs; nothing is measured with it
NVML = """
from types import SimpleNamespace
class NVMLError(Exception): pass
def nvmlInit(): pass
def nvmlDeviceGetHandleByIndex(index):
    if index: raise NVMLError("not found")
def nvmlDeviceGetPowerUsage(gpu): return 300_000
def nvmlDeviceGetUtilizationRates(gpu): return SimpleNamespace(gpu=87)
def nvmlDeviceGetMemoryInfo(gpu): return SimpleNamespace(used=995, total=1000)
def nvmlDeviceGetTotalEnergyConsumption(gpu): raise NVMLError("not supported")
"""


def programs():
    """Skips the test, or fails it where Prometheus is required."""
    found = [shutil.which(name) for name in ("prometheus", "promtool")]
    if None in found:
        (pytest.fail if os.environ.get(REQUIRED) else pytest.skip)(
            "no Prometheus: apt-get install --no-install-recommends prometheus"
        )
    return found


# --- Counting ---


def test_counters_are_those_of_the_records_to_the_last_one():
    metrics, target = Metrics(), tiny_target()
    value = metrics.registry.get_sample_value
    engine = Engine(target, {"type": "ngram", "num_draft_tokens": 3}, max_rows=2)
    engine.observer = metrics
    ids = [engine.submit(prompt, max_new_tokens=40) for prompt in [*PROMPTS, [5, 6] * 9]]
    gone = engine.submit([5, 6], max_new_tokens=5)
    engine.step()
    assert value("specdec_num_requests_running") == 2
    assert value("specdec_num_requests_waiting") == len(ids) + 1 - 2
    engine.step()
    engine.preempt()  # what is cached again is not counted again
    engine.cancel(gone)
    run(engine)
    results = [engine.result(index) for index in ids]
    records = [each for result in results for each in result.records]
    stats = AcceptanceStats.from_records(records)
    places = [value(f"{SPEC}_accepted_tokens_per_pos_total", {"position": str(i)}) for i in (0, 1)]
    assert places == list(stats.accepted_at[:2])
    assert stats.num_accepted > 0
    told = {
        f"{SPEC}_drafts_total": sum(record.num_drafted > 0 for record in records),
        f"{SPEC}_draft_tokens_total": stats.num_drafted,
        f"{SPEC}_accepted_tokens_total": stats.num_accepted,
        "specdec_generation_tokens_total": sum(len(result.tokens) for result in results),
        "specdec_prompt_tokens_total": sum(len(result.prompt_tokens) for result in results),
        "specdec_time_to_first_token_seconds_count": len(ids),
        "specdec_inter_token_latency_seconds_count": len(records),
        "specdec_e2e_request_latency_seconds_count": len(ids) + 1,
        "specdec_num_requests_running": 0,
        "specdec_num_requests_waiting": 0,
    }
    assert {name: value(name) for name in told} == told
    for reason, count in {"length": len(ids), "cancelled": 1}.items():
        assert value("specdec_request_success_total", {"finished_reason": reason}) == count


def test_a_port_that_is_taken_or_none_and_a_missing_package_are_refused(monkeypatch):
    server, thread = start_http_server(0, "127.0.0.1", REGISTRY)
    for port in (server.server_port, 70_000):
        done = CliRunner().invoke(app, ["bench", "demo", "--list", "--metrics-port", str(port)])
        assert done.exit_code == 2
        assert f"--metrics-port {port}: " in done.stderr
    server.shutdown()
    server.server_close()
    thread.join()
    monkeypatch.setitem(sys.modules, "prometheus_client", None)  # importing it fails
    done = CliRunner().invoke(app, ["bench", "demo", "--list", "--metrics-port", "0"])
    assert (done.exit_code, "pip install 'specdec-lab[metrics]'" in done.stderr) == (2, True)


# --- Dashboard and alerts ---


def test_the_dashboard_is_what_its_script_writes():
    script = {"__name__": "", "__file__": str(ROOT / "scripts" / "write_dashboard.py")}
    exec(Path(script["__file__"]).read_text(), script)
    assert (DASHBOARDS / "grafana.json").read_text() == script["text"]()


def test_compose_mounts_files_that_are_there():
    compose = yaml.safe_load((DASHBOARDS / "compose.yaml").read_text())
    for service in compose["services"].values():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
        files = [each.split(":")[0] for each in service["volumes"] if each[0] == "."]
        assert all((DASHBOARDS / file).is_file() for file in files)
        assert {each["source"] for each in service.get("configs", ())} <= set(compose["configs"])
    for each in compose["configs"].values():
        assert yaml.safe_load(each["content"])["apiVersion"] == 1


SICK = {
    'up{instance="ended"}': "0x30",
    'up{instance="well"}': "1x30",
    'specdec_gpu_memory_used_bytes{instance="full", gpu="0"}': "99x30",
    'specdec_gpu_memory_used_bytes{instance="well", gpu="0"}': "97x30",
    'specdec_gpu_memory_total_bytes{instance="full", gpu="0"}': "100x30",
    'specdec_gpu_memory_total_bytes{instance="well", gpu="0"}': "100x30",
    'vllm:kv_cache_usage_perc{instance="crowded"}': "0.99x30",
    'vllm:kv_cache_usage_perc{instance="well"}': "0.5x30",
    'llamacpp:tokens_predicted_total{instance="slow"}': "0+6x30",
    'llamacpp:requests_processing{instance="slow"}': "1x30",
    'specdec_generation_tokens_total{instance="idle"}': "9x30",
    'specdec_num_requests_running{instance="idle"}': "0x30",
    'vllm:generation_tokens_total{instance="well"}': "0+6000x30",
    'vllm:num_requests_running{instance="well"}': "1x30",
    'specdec_spec_decode_num_accepted_tokens_total{instance="bad"}': "0+9x30",
    'specdec_spec_decode_num_draft_tokens_total{instance="bad"}': "0+100x30",
    'vllm:spec_decode_num_accepted_tokens_total{instance="well"}': "0+11x30",
    'vllm:spec_decode_num_draft_tokens_total{instance="well"}': "0+100x30",
    'sglang:spec_accept_rate{instance="worse"}': "0.05x30",
    'sglang:num_running_reqs{instance="worse"}': "1x30",
}
FIRING = {
    **{"ended": "TargetDown", "full": "GpuMemoryFull", "crowded": "KvCacheFull"},
    **{"slow": "ThroughputLow", "bad": "AcceptanceCollapsed", "worse": "AcceptanceCollapsed"},
}


def test_every_alert_fires_for_what_is_sick_alone(tmp_path):
    promtool = programs()[1]
    for check in (["rules", "alerts.yml"], ["config", "prometheus.yml"]):
        subprocess.run([promtool, "check", *check], cwd=DASHBOARDS, check=True)
    assert set(FIRING.values()) == {rule["alert"] for rule in RULES}
    firing = [
        {"labels": f'{{alertname="{alert}", instance="{instance}"}}', "value": 1}
        for instance, alert in FIRING.items()
    ]
    expr = 'count by (alertname, instance) (ALERTS{alertstate="firing"})'
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in SICK.items()],
        "promql_expr_test": [{"expr": expr, "eval_time": "25m", "exp_samples": firing}],
    }
    content = {"rule_files": [str(DASHBOARDS / "alerts.yml")], "tests": [test]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(content))
    subprocess.run([promtool, "test", "rules", str(tmp_path / "test.yml")], check=True)


# --- A real run, scraped ---


@pytest.fixture
def command(tmp_path):
    """A bench that runs until it is interrupted, on a machine with a GPU that is nearly full."""
    (tmp_path / "pynvml.py").write_text(NVML)
    arms = "arms=[{name: eagle3, type: eagle3, options: {depth: 3, width: 1}}]"
    small = ["prompts.num=2", "max_new_tokens=12", "repeats=4096", arms]
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    process = subprocess.Popen(
        [*BENCH, *small, "--metrics-port", "0", "--out", str(tmp_path / "bench")],
        **{"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True},
        env={**os.environ, "PYTHONPATH": paths},
        # A shell's background jobs are born deaf to Ctrl-C, and so would this be.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    said = process.stderr.readline()
    yield process, said.rpartition("//")[2].removesuffix("/metrics\n")
    process.kill()
    process.wait()


@pytest.fixture
def engines():
    """Metrics of vLLM, SGLang and llama.cpp as they write them, at one address."""
    kinds = {"extensions_map": {"": "text/plain; version=0.0.4"}, "log_message": lambda *_: None}
    handler = type("Handler", (SimpleHTTPRequestHandler,), kinds)
    folder = Path(__file__).parent / "engine_metrics"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def query(tmp_path, command, engines):
    """Asks a Prometheus that scrapes both five times a second; gives the values, or complains."""
    config = {
        "global": {"scrape_interval": "200ms", "evaluation_interval": "1s"},
        "rule_files": [str(DASHBOARDS / "alerts.yml")],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [target]}]}
            for job, target in {"specdec": command[1], "engines": engines}.items()
        ],
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*probe.getsockname())
    flags = {
        "config.file": tmp_path / "prometheus.yml",
        "storage.tsdb.path": tmp_path / "data",
        "web.listen-address": address,
        "log.level": "error",
    }
    process = subprocess.Popen([programs()[0], *(f"--{k}={v}" for k, v in flags.items())])

    def ask(expr):
        asked = urllib.parse.urlencode({"query": expr})
        with urllib.request.urlopen(f"http://{address}/api/v1/query?{asked}") as answer:
            found = json.load(answer)["data"]["result"]
        return [float(each["value"][1]) for each in found]

    def is_up():
        try:
            return ask("up") == [1, 1]
        except OSError:
            return False

    wait_until(is_up)
    yield ask
    process.terminate()
    process.wait()


def wait_until(holds, missing="nobody answers"):
    until = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < until, missing
        time.sleep(0.2)


@pytest.mark.slow
def test_a_real_prometheus_has_data_for_every_panel_and_alert(command, query):
    def values(expr):
        return query(expr.replace("$instance", ".*").replace("$__rate_interval", "1m"))

    missing = [expr for expr in QUERIES if re.search("specdec_|process_", expr)]
    assert len(missing) > 20

    def is_complete():  # a quantile is NaN until a request has ended between two scrapes
        assert command[0].poll() is None, command[0].stderr.read()
        while missing and any(map(math.isfinite, values(missing[0]))):
            del missing[0]
        return not missing

    wait_until(is_complete, missing)
    assert [expr for expr in QUERIES if not values(expr)] == []
    assert {rule["alert"] for rule in RULES if query(rule["expr"])} >= {"GpuMemoryFull"}
    assert query("specdec_gpu_power_watts") == [300]
    assert query("specdec_gpu_energy_joules") == []
    assert query("specdec_progress_total") == [4096 * 2 * 3]
    command[0].send_signal(signal.SIGINT)
    assert command[0].wait(PATIENCE_S) == 130
    assert "Traceback" not in command[0].stderr.read()
