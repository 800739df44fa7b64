"""The docs site builds without a warning, and its Python blocks run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = [
    pytest.param(block, id=f"{path.stem}-{place}")
    for path in sorted((ROOT / "docs").glob("*.md"))
    for place, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.S))
    if path.stem not in ("engine", "verify") and "{..." not in block  # those are proven elsewhere
]


@pytest.mark.slow
def test_site_builds_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "api" / "index.html").is_file()


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block):
    exec(compile(block, "docs", "exec"), {})
