"""The tables of this experiment's README, from its committed results; ../tables.py has the speeds.

python experiments/03-domain/tables.py
"""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DOMAINS = ("gsm8k", "sgd", "taskmaster4")
DRAFTERS = {
    "draft model, generic": "generic-draft",
    "draft model, QLoRA on gsm8k": "qlora-gsm8k",
    "draft model, QLoRA on sgd": "qlora-sgd",
    "EAGLE-3, generic": "generic-eagle3",
    "EAGLE-3, trained on for gsm8k": "eagle3-gsm8k",
    "EAGLE-3, trained on for sgd": "eagle3-sgd",
}
SIZES = {"0": "generic-draft", "100": "qlora-sgd-100", "500": "qlora-sgd-500"}
SIZES |= {"2,000": "qlora-sgd", "8,000": "qlora-sgd-8000"}
SIZES |= {"2,000, 800 steps": "qlora-sgd-2000-long", "8,000, 800 steps": "qlora-sgd-8000-long"}
OBJECTIVES = {
    "generic": "generic-draft",
    "cross-entropy": "qlora-gsm8k-cross_entropy",
    "forward KL": "qlora-gsm8k",
    "reverse KL": "qlora-gsm8k-reverse_kl",
    "total variation": "qlora-gsm8k-total_variation",
    "embedded draft model": "demo",
    "embedded, forward KL on gsm8k": "qlora-demo-gsm8k",
}


def read(name: str) -> dict[str, Any]:
    return json.loads((HERE / name).read_text())


def percent(figure: dict[str, Any]) -> str:
    low, high = figure["interval"]
    return f"{100 * figure['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def table(head: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def main() -> None:
    alphas = {domain: read(f"alpha-{domain}.json")["drafters"] for domain in DOMAINS}
    for temperature in ("0", "1"):
        print(f"alpha in per cent, T = {temperature}\n")
        rows = [
            [name, *(percent(alphas[d][key]["alpha"][temperature]) for d in DOMAINS)]
            for name, key in DRAFTERS.items()
        ]
        table(["drafter", *DOMAINS], rows)
    for title, names, domain in (("queries", SIZES, "sgd"), ("objective", OBJECTIVES, "gsm8k")):
        rows = [
            [label, *(percent(alphas[domain][key]["alpha"][t]) for t in ("0", "1"))]
            for label, key in names.items()
        ]
        table([title, f"alpha on {domain}, T = 0", "T = 1"], rows)
    rows = []
    for name, run in read("training.json").items():
        parity = run["parity"]
        figures = (f"{run[key]:,.0f}" for key in ("steps", "tokens", "seconds"))
        gate = f"{parity['predicted_tau']:.3f} / {parity['measured_tau']:.3f}"
        rows.append([name, *figures, gate])
    table(["run", "steps", "tokens", "seconds", "tau predicted / measured"], rows)
    speeds = read("throughput.json")
    rows = [
        [name, f"{each['tokens_per_s']:,.0f}", f"{100 * each['share_of_source']:.1f} %"]
        for name, each in speeds.items()
    ]
    table(["target", "tokens/s", "of it in the target or the store"], rows)
    choices = read("bytes.json")["choices"]
    rows = [
        [
            ",".join(map(str, choice["taps"])) or "none",
            choice["dtype"],
            str(choice["top_k"]),
            f"{choice['bytes_per_token']:,.0f}",
        ]
        for choice in choices
        if choice["top_k"] in (0, 64)
    ]
    table(["taps", "dtype", "top-k", "bytes per token"], rows)


if __name__ == "__main__":
    main()
