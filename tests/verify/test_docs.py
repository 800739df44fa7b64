"""The manual runs as printed, and importing the verifier brings in torch alone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/verify.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=["verify", "conformance"])
def test_the_manuals_examples_run(block, capsys):
    exec(compile(block, "docs/verify.md", "exec"), {})
    assert capsys.readouterr().out.startswith(("tensor([[", "engine: passed"))


@pytest.mark.slow
def test_importing_verify_loads_torch_alone():
    script = (
        "import torch, sys; before = set(sys.modules); import specdec.verify.conformance;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new - set(sys.stdlib_module_names) - {'torch'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "['specdec']"
