"""Write dashboards/grafana.json: rows of like panels for specdec, vLLM, SGLang and llama.cpp.

python scripts/write_dashboard.py
"""

import json
from pathlib import Path

FILE = Path(__file__).parents[1] / "dashboards" / "grafana.json"
CHOSEN = '{instance=~"$instance"}'


def rate(name, by="instance"):
    return f"sum by ({by}) (rate({name}{CHOSEN}[$__rate_interval]))"


def gauge(name, how="sum"):
    return f"{how} by (instance) ({name}{CHOSEN})"


def latency(name):
    rates = rate(f"{name}_seconds_bucket", "instance, le")
    return {f"p{q}": f"histogram_quantile(0.{q}, {rates})" for q in (50, 95, 99)}


def latencies(prefix):
    return [
        ("Time to first token", "s", latency(f"{prefix}time_to_first_token")),
        ("Inter-token latency", "s", latency(f"{prefix}inter_token_latency")),
        ("Request latency", "s", latency(f"{prefix}e2e_request_latency")),
    ]


def acceptance(prefix):
    """Panels of the schema that specdec, vLLM and llama.cpp share."""
    drafts, drafted, accepted = (
        rate(f"{prefix}spec_decode_num_{kind}_total")
        for kind in ("drafts", "draft_tokens", "accepted_tokens")
    )
    by_place = rate(f"{prefix}spec_decode_num_accepted_tokens_per_pos_total", "instance, position")
    return [
        ("Acceptance rate", "percentunit", {"": f"{accepted} / {drafted}"}),
        ("Accepted length", "none", {"": f"1 + {accepted} / {drafts}"}),
        (
            "Acceptance by position",
            "percentunit",
            {"{{position}}": f"{by_place} / on (instance) group_left {drafts}"},
        ),
    ]


def load(tokens, running, waiting):
    return [
        ("Tokens per second", "none", {"": rate(tokens)}),
        ("Requests", "none", {"running": gauge(running), "waiting": gauge(waiting)}),
    ]


def like_vllm(prefix):
    tokens, requests = f"{prefix}generation_tokens_total", f"{prefix}num_requests_"
    panels = load(tokens, f"{requests}running", f"{requests}waiting")
    return acceptance(prefix) + panels + latencies(prefix)


GPU = {figure: f"specdec_gpu_{figure}{CHOSEN}" for figure in ("power_watts", "utilization")}
USED, TOTAL = (f"specdec_gpu_memory_{kind}_bytes{CHOSEN}" for kind in ("used", "total"))
WATTS, TOKENS = gauge("specdec_gpu_power_watts"), rate("specdec_generation_tokens_total")
ROWS = {
    "specdec": [
        *like_vllm("specdec_"),
        (
            "Progress of the command",
            "percentunit",
            {"": f"{gauge('specdec_progress_done')} / {gauge('specdec_progress_total')}"},
        ),
    ],
    "Machine": [
        ("GPU power", "watt", {"GPU {{gpu}}": GPU["power_watts"]}),
        ("GPU memory", "percentunit", {"GPU {{gpu}}": f"{USED} / {TOTAL}"}),
        ("GPU utilization", "percentunit", {"GPU {{gpu}}": GPU["utilization"]}),
        ("specdec's tokens per joule", "none", {"": f"{TOKENS} / {WATTS}"}),
        ("CPU cores of the process", "none", {"": rate("process_cpu_seconds_total")}),
        ("Resident memory", "bytes", {"": gauge("process_resident_memory_bytes")}),
    ],
    "vLLM": [
        *like_vllm("vllm:"),
        ("KV cache", "percentunit", {"": gauge("vllm:kv_cache_usage_perc", "max")}),
    ],
    "SGLang": [
        ("Acceptance rate", "percentunit", {"": gauge("sglang:spec_accept_rate", "max")}),
        ("Accepted length", "none", {"": gauge("sglang:spec_accept_length", "max")}),
        *load("sglang:generation_tokens_total", "sglang:num_running_reqs", "sglang:num_queue_reqs"),
        *latencies("sglang:"),
        ("KV cache", "percentunit", {"": gauge("sglang:token_usage", "max")}),
    ],
    "llama.cpp": [
        *acceptance("llamacpp:"),
        *load(
            "llamacpp:tokens_predicted_total",
            "llamacpp:requests_processing",
            "llamacpp:requests_deferred",
        ),
    ],
}


def dashboard():
    """Make the dashboard, three panels beside each other under the title of their row."""
    panels, y = [], 0
    for row, shown in ROWS.items():
        place = {"h": 1, "w": 24, "x": 0, "y": y}
        panels.append({"type": "row", "title": row, "id": len(panels) + 1, "gridPos": place})
        for number, (title, unit, queries) in enumerate(shown):
            place = {"h": 7, "w": 8, "x": number % 3 * 8, "y": y + 1 + number // 3 * 7}
            targets = [
                {
                    "refId": "ABC"[i],
                    "expr": expr,
                    "legendFormat": f"{{{{instance}}}} {legend}".strip(),
                }
                for i, (legend, expr) in enumerate(queries.items())
            ]
            panels.append(
                {
                    "type": "timeseries",
                    "title": title,
                    "id": len(panels) + 1,
                    "gridPos": place,
                    "datasource": {"type": "prometheus", "uid": "${datasource}"},
                    "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
                    "targets": targets,
                }
            )
        y += 1 + (len(shown) + 2) // 3 * 7
    instances = {
        **{"name": "instance", "type": "query", "query": "label_values(up, instance)"},
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        **{"includeAll": True, "allValue": ".*", "multi": True, "refresh": 2},
    }
    source = {"name": "datasource", "type": "datasource", "query": "prometheus"}
    return {
        **{"uid": "specdec", "title": "Speculative decoding", "schemaVersion": 39, "version": 1},
        **{"refresh": "5s", "time": {"from": "now-15m", "to": "now"}, "editable": True},
        "templating": {"list": [source, instances]},
        "panels": panels,
    }


def text():
    """The file, a line a panel."""
    head = dashboard()
    lines = ",\n".join(json.dumps(panel) for panel in head.pop("panels"))
    return f'{json.dumps(head)[:-1]}, "panels": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    FILE.write_text(text())
