"""The house: imports run downward only, and the light packages stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "specdec"

# Ground floor first. A module may import from its own floor's earlier names and from floors below.
FLOORS = [
    ["verify", "common"],
    ["sampling", "demo"],
    ["engine", "registry", "checkpoints"],
    ["targets"],
    ["drafters"],
    ["bench", "lossless", "proxy", "serve"],
    ["data"],
    ["analysis"],
    ["train", "planning", "engines"],
    ["report"],
    ["cli", "__main__", "integrations"],
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            yield path, parts


def imported(path):
    """Names under `specdec` that a module imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("specdec"):
            yield [*node.module.split("."), None][1] or node.names[0].name
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.startswith("specdec."):
                    yield name.name.split(".")[1]


def test_every_module_has_a_floor():
    assert {parts[0] for _, parts in modules()} == set(FLOOR_OF)


@pytest.mark.parametrize(
    ("path", "parts"), [pytest.param(*m, id=".".join(m[1])) for m in modules()]
)
def test_imports_run_downward(path, parts):
    for name in imported(path):
        if name != parts[0]:
            assert FLOOR_OF[name] <= FLOOR_OF[parts[0]], f"{'.'.join(parts)} imports {name}"


@pytest.mark.parametrize(
    "module",
    [
        *["specdec", "specdec.verify", "specdec.verify.conformance"],
        "specdec.integrations.vllm, specdec.common.metrics",
    ],
)
def test_light_imports_bring_nothing_but_torch(module):
    script = (
        f"import torch, sys; before = set(sys.modules); import {module};"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new - set(sys.stdlib_module_names) - {'torch'}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "['specdec']", done.stderr


def test_tables_and_pages_need_nothing_that_talks_to_servers():
    missing = "".join(f"sys.modules['{name}'] = None;" for name in ("httpx", "tenacity", "uvicorn"))
    script = f"import sys; {missing} import specdec.cli.measure, specdec.report.bench"
    subprocess.run([sys.executable, "-c", f"{script}, specdec.report.page"], check=True)
