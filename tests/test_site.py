"""The site builds without a warning; what it types parses, and runs on the embedded models."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
from command_lines import commands, parse
from own_queries import write_queries
from typer.testing import CliRunner

from specdec.cli import app

ROOT = Path(__file__).parent.parent
PAGES = {
    path.name: path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
}
# Models of the hub, for which the embedded ones stand in.
HUB = re.compile(r"\b(?:Qwen|meta-llama|yuhuili)/[\w.-]+")
BLOCKS = [
    pytest.param(HUB.sub("demo", block), id=f"{name}-{place}")
    for name, page in sorted(PAGES.items())
    for place, block in enumerate(re.findall(r"```python\n(.*?)```", page, re.S))
    # These are proven elsewhere.
    if name not in ("README.md", "engine.md", "verify.md") and "{..." not in block
]
SHELL = [
    (name, mark, block)
    for name, page in sorted(PAGES.items())
    for mark, block in re.findall(r"(<!-- run -->\n)?```sh\n(.*?)```", page, re.S)
]
TYPED = [(name, words) for name, _, block in SHELL for words in commands(block)]
TYPED += [
    (name, words)
    for name, page in sorted(PAGES.items())
    for line in re.findall(r"`(specdec [^`]* --[a-z-]+ [^`]*)`", page)
    if not re.search(r"[A-Z]{3}|\.\.\.", line)
    for words in commands(line)
]


@pytest.mark.slow
def test_site_builds_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "api" / "index.html").is_file()
    made = {"commands": "--max-body", "drafters": "num_continuations", "concepts": "loop eff."}
    for page, text in made.items():
        assert text in (tmp_path / page / "index.html").read_text()


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block):
    exec(compile(block, "docs", "exec"), {})


@pytest.mark.parametrize(("page", "words"), TYPED, ids=lambda given: str(given)[:60])
def test_typed_commands_parse(page, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    is_elsewhere = len(words) > 1 and words[1].endswith(".yaml") and not Path(words[1]).exists()
    parse([words[0], "demo", *words[2:]] if is_elsewhere else words)


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for _, mark, block in SHELL if mark])
def test_marked_commands_run(block, tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDEC_DATA_DIR", str(write_queries(tmp_path / "data")))
    monkeypatch.chdir(tmp_path)
    for words in commands(HUB.sub("demo", block)):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, f"{words}: {done.output}"


def test_quoted_messages_are_those_of_the_code():
    said = "\n".join(
        "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        if isinstance(node, ast.JoinedStr)
        else str(node.value)
        for path in (ROOT / "specdec").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.JoinedStr | ast.Constant)
    )
    quoted = re.findall(r"^\| `(.+?)` \|", PAGES["troubleshooting.md"], re.M)
    assert len(quoted) > 20
    assert [text for text in quoted if text not in said] == []


@pytest.mark.slow
def test_notebook_runs_and_keeps_no_output():
    notebook = nbformat.read(ROOT / "docs/first-hour.ipynb", as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    assert "tau" in str([cell.get("outputs") for cell in notebook.cells])


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)", PAGES["README.md"]))
def test_link_of_the_readme_leads_to_a_file(link):
    assert (ROOT / link).exists()
