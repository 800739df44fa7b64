"""Drafters in real engines: greedy texts are ours, and their counters ours to the last integer.

The engines are those that scripts/engines.sh makes; each admission starts one, in a process.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from specdec.checkpoints import read_head
from specdec.checkpoints.layouts import write_head
from specdec.common.config import read_model
from specdec.demo import demo_path
from specdec.engines.admit import AdmitConfig, admit
from specdec.engines.export import RECORD, Exported

ROOT = Path(__file__).parents[2]
MARKS = {
    "llama.cpp": [pytest.mark.llamacpp, pytest.mark.slow],
    "vllm": [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)],
}
CASES = [
    ("llama.cpp", "demo/draft", None, 6),
    ("llama.cpp", "demo/eagle3", None, 6),
    ("vllm", "demo/eagle3", None, 20),
    ("vllm", "demo/eagle3", "speculators", 20),
    ("vllm", "demo/eagle", "eagle", 20),
    ("vllm", "demo/draft", None, 20),
    ("vllm", "demo/medusa", None, 20),
    ("vllm", "suffix", None, 20),
    ("vllm", "ngram", None, 20),
]


@pytest.fixture
def engines(monkeypatch):
    home = os.environ.get("SPECDEC_ENGINES_DIR", str(ROOT / ".engines"))
    monkeypatch.setenv("SPECDEC_ENGINES_DIR", home)
    return Path(home)


def in_layout(name, layout, folder):
    """An embedded head in another layout; a bias, which vLLM has no place for, is left out."""
    head = read_head(str(demo_path(name)))
    tensors = {key: tensor for key, tensor in head.tensors.items() if not key.endswith("fc.bias")}
    options = {**head.options, "bias": False} if "bias" in head.options else head.options
    folder.mkdir()
    write_head(replace(head, tensors=tensors, options=options), folder, layout)
    return str(folder)


@pytest.mark.parametrize(
    ("engine", "drafter", "layout", "num"),
    [pytest.param(*case, marks=MARKS[case[0]]) for case in CASES],
)
def test_engine_gives_our_texts_and_our_counts(engine, drafter, layout, num, engines, tmp_path):
    name = engine.replace(".", "")
    if not (engines / name / "bin" / "python").exists():
        pytest.skip(f"{engine} is not installed in {engines}: bash scripts/engines.sh {name}")
    if layout:
        drafter = in_layout(drafter.removeprefix("demo/"), layout, tmp_path / "head")
    asked = AdmitConfig(
        engine=engine, target=str(demo_path("target")), num=num, plain=drafter == "demo/draft"
    )
    found = admit(drafter, asked, tmp_path / "out", lambda *progress: None)
    if engine == "llama.cpp":  # the GGUF files passed the comparison of their tokenizers
        made = read_model(Exported, tmp_path / "out" / "export" / RECORD)
        assert {"target.gguf", "drafter.gguf", "launch.sh"} <= {*made.files}
        assert f"--spec-type {made.method} --spec-draft-model" in made.command
    assert (found.target, found.model) == ("target", "target" + ".gguf" * (engine == "llama.cpp"))
    assert not found.differences
    assert found.equal_texts["drafter"] == num
    assert found.theirs == found.ours
    assert found.ours["accepted"] > 0
