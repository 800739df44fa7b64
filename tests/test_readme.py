"""Every command and every block of the README runs."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from own_queries import write_queries

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
BLOCKS = [block.splitlines() for block in re.findall(r"```sh\n(.*?)```", README, re.S)]
SHELL = [line for block in BLOCKS for line in block]


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(block):
    exec(compile(block, "README.md", "exec"), {})


def test_the_readme_drafter_fits_the_protocol_and_is_lossless():
    from tiny_models import tiny_target

    from specdec import Drafter, generate, generate_baseline

    names: dict = {}
    exec(next(block for block in PYTHON if "class RepeatDrafter" in block), names)
    drafter, target = names["RepeatDrafter"](), tiny_target()
    assert isinstance(drafter, Drafter)
    ours = generate(target, drafter, [[1, 2], [3]], max_new_tokens=20)
    plain = generate_baseline(target, [[1, 2], [3]], max_new_tokens=20)
    assert [r.tokens for r in ours] == [r.tokens for r in plain]


COMMANDS = [[line for line in block if line.startswith("specdec")] for block in BLOCKS]


@pytest.mark.parametrize("commands", [block for block in COMMANDS if block])
def test_specdec_commands_run_one_after_the_other(commands, tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDEC_DATA_DIR", str(write_queries(tmp_path / "data")))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", *shlex.split(command)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        assert done.stdout.strip()


@pytest.mark.parametrize("command", [line for line in SHELL if line.startswith("bash")])
def test_scripts_exist_and_parse(command):
    script = ROOT / command.split()[1]
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_measured_table_says_what_the_committed_results_say():
    results = json.loads((ROOT / "experiments/02-heads/t0/results.json").read_text())
    section = README.split("## Measured")[1].split("\n## ")[0]
    table = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    assert len(table) == 2 + len(results["arms"])
    for row, arm in zip(table[2:], results["arms"], strict=True):
        for shown, key in zip(row[1:], ("tau", "speedup_vs_plain", "speedup_vs_hf"), strict=True):
            value, interval = arm[key], arm[f"{key}_ci"]
            given = [float(number) for number in re.findall(r"\d+\.\d+", shown)]
            wanted = [] if value is None else [value, *interval] if len(given) > 1 else [value]
            assert given == [round(number, 2) for number in wanted], arm["name"]


def test_the_domain_table_says_what_the_committed_results_say():
    folder = ROOT / "experiments/03-domain"
    section = README.split("## From your queries")[1].split("\n## ")[0]
    table = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    start = next(n for n, row in enumerate(table) if row[0] == "drafter")
    runs = ["generic-draft", "qlora-gsm8k", "qlora-sgd"]
    runs += ["generic-eagle3", "eagle3-gsm8k", "eagle3-sgd"]
    arms = [f"draft {name}" for name in ("generic", "for gsm8k", "for sgd")]
    arms += [f"eagle3 {name}" for name in ("generic", "for gsm8k", "for sgd")]
    wanted = [[] for _ in runs]
    for domain in ("gsm8k", "sgd"):
        alphas = json.loads((folder / f"alpha-{domain}.json").read_text())["drafters"]
        found = json.loads((folder / f"bench-{domain}/results.json").read_text())["arms"]
        speeds = {arm["name"]: arm["speedup_vs_plain"] for arm in found}
        for row, run, arm in zip(wanted, runs, arms, strict=True):
            share = alphas[run]["alpha"]["0"]["value"]
            row += [f"{100 * share:.1f} %", f"{speeds[arm]:.2f}"]
    assert [row[1:] for row in table[start + 2 :]] == wanted
