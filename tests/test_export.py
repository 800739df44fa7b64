"""What each engine is handed, and what is refused."""

import json
import os
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from checkpoints import save_checkpoint
from safetensors.torch import load_file
from tiny_models import tiny_llama
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).parent / "head_checkpoints"))
from random_heads import HEADS, NUM_LAYERS, random_head, target

from specdec.checkpoints import HeadCheckpoint, identify_target, read_head, write_head
from specdec.cli import app
from specdec.demo import demo_path
from specdec.drafters.heads import build_head
from specdec.engines import gguf
from specdec.engines.export import ENGINES, Exported, export

DEMO = str(demo_path("target").resolve())
ENGINE = Path(os.environ.get("SPECDEC_ENGINES_DIR", ".engines")) / "llamacpp/bin/python"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders of a target and of heads for it, by name."""
    root = tmp_path_factory.mktemp("tiny")
    save_checkpoint(root / "target", tiny_llama(vocab_size=61, num_layers=NUM_LAYERS))
    for name in HEADS:
        write_head(replace(random_head(name), training={}), root / name)
    plain = build_head("eagle", {"bias": False}, target())
    facts = plain.options.model_dump(exclude_none=True), plain.state_dict()
    identity = identify_target(target())
    write_head(HeadCheckpoint("eagle", *facts, target=identity), root / "eagle-plain")
    return root


def handed(tiny, name, engine, out):
    return export(str(tiny / name), engine, out, target=str(tiny / "target"))


def test_each_engine_is_told_the_layers_as_it_counts_them(tiny, tmp_path):
    taps = random_head("eagle3").options["taps"]
    made = {name: handed(tiny, "eagle3", name, tmp_path / name) for name in ENGINES[:3]}
    for name in made:
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["eagle_aux_hidden_state_layer_ids"] == taps
        inner = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
        assert inner == [tap - 1 for tap in taps]
        assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    told = made["tensorrt-llm"].config["speculative_config"]
    assert told["eagle3_layers_to_capture"] == [tap - 1 for tap in taps]
    file = made["tensorrt-llm"].launch[-1]
    assert yaml.safe_load(Path(file).read_text()) == made["tensorrt-llm"].config
    published = export("demo/eagle3", "tensorrt-llm", tmp_path / "published")
    assert "eagle3_layers_to_capture" not in published.config["speculative_config"]


def test_head_stays_in_a_layout_that_the_engine_reads(tiny, tmp_path):
    """One that the first layout cannot hold takes the next, which names its verifier."""
    made = handed(tiny, "eagle3-normed", "vllm", tmp_path / "one")
    config = json.loads((tmp_path / "one/config.json").read_text())
    verifier = {"name_or_path": str(tiny / "target"), "architectures": ["LlamaForCausalLM"]}
    assert config["speculators_config"]["verifier"] == verifier
    assert config["auto_map"] == {"": "config.Eagle3SpeculatorConfig"}
    assert (config["dtype"], "torch_dtype" in config) == ("float32", False)
    assert (made.method, made.config["model"]) == ("eagle3", str(tmp_path / "one"))
    assert (tmp_path / "one/model.safetensors").exists()
    write_head(replace(random_head("eagle3"), training={}), tmp_path / "two", "speculators")
    export(str(tmp_path / "two"), "vllm", tmp_path / "three", target=str(tiny / "target"))
    assert read_head(tmp_path / "three").layout == "speculators"


def test_sglang_always_finds_a_bias_and_vllm_never(tiny, tmp_path):
    handed(tiny, "eagle-plain", "vllm", tmp_path / "vllm")
    assert "fc.bias" not in load_file(tmp_path / "vllm/model.safetensors")
    for name in ("eagle-plain", "eagle-biased"):
        handed(tiny, name, "sglang", tmp_path / name)
        bias = load_file(tmp_path / name / "model.safetensors")["fc.bias"]
        assert bias.any() == (name == "eagle-biased")
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["architectures"], config["bias"]) == (["LlamaForCausalLMEagle"], False)
        assert read_head(tmp_path / name).options == read_head(tiny / name).options


LAUNCHED = [
    ("ngram", "vllm", 'SPECDEC_DRAFTER=.* "custom_class", .*integrations.vllm.Proposer'),
    ("demo/draft", "vllm", '--speculative-config .*"draft_model", "model": "/.*demo/draft"'),
    ("demo/medusa", "vllm", '"num_speculative_tokens": 4'),  # it has four heads
    ("demo/eagle3", "sglang", "EAGLE3 .*-num-steps 5 .*-eagle-topk 1 .*-num-draft-tokens 6"),
    ("draft_model", "sglang", "--speculative-algorithm STANDALONE "),
    ("demo/draft", "tensorrt-llm", "trtllm-serve /.*target --extra_llm_api_options /.*.yaml"),
    ("demo/draft", "transformers", "python /.*/generate.py"),
    ("demo/draft", "tabbyapi", "python main.py --config /.*/config.yml"),
    ("demo/draft", "exllamav2", "python /.*/generate.py"),
]


@pytest.mark.parametrize(("drafter", "engine", "line"), LAUNCHED)
def test_launch_line_is_what_the_engine_reads(tmp_path, drafter, engine, line):
    out = tmp_path / "out"
    made = export(drafter, engine, out)
    assert re.search(line, made.command)
    assert shlex.split(made.command)[len(made.environment) :] == made.launch
    assert made.command in (out / "launch.sh").read_text()
    assert Exported.model_validate_json((out / "specdec-export.json").read_text()) == made
    assert sorted(each.name for each in out.iterdir()) == made.files
    if (out / "generate.py").exists():
        compile((out / "generate.py").read_text(), "generate.py", "exec")
    if engine == "tabbyapi":
        told = yaml.safe_load((out / "config.yml").read_text())["draft_model"]
        assert told == {
            **{"draft_mode": "model", "draft_num_tokens": 5, "draft_cache_mode": "FP16"},
            **{"draft_model_dir": str(Path(DEMO).parent), "draft_model_name": "draft"},
        }


REFUSED = [
    ("eagle-biased", "vllm", "drop, without a word, the head's bias; .*drafter.options.bias=false"),
    ("eagle", "sglang", "the head's qkv_bias"),
    ("eagle3-normed", "sglang", "norm_before_residual"),
    ("eagle3-normed", "tensorrt-llm", "norm_before_residual"),
    ("eagle3-whole", "llama.cpp", "norm_output"),
    ("eagle3-deep", "llama.cpp", "num_layers; train it without, drafter.options.num_layers=1"),
    ("eagle3-deep", "sglang", "num_layers=3"),
    ("eagle3.1", "sglang", "the head's fc_norm"),
    ("eagle3.1-qwen3", "llama.cpp", "fc_norm|qk_norm"),
    ("medusa", "sglang", "no method for the drafter 'medusa'; it is run by vllm"),
    ("medusa-shared", "vllm", "cannot hold heads without projections"),
    ("eagle-plain", "llama.cpp", "'eagle'; it is run by sglang, vllm"),
    ("eagle3", "vlm", "'vlm' is no engine to export to; .* did you mean 'vllm'"),
]


@pytest.mark.parametrize(("name", "engine", "message"), REFUSED)
def test_what_an_engine_would_not_run_is_refused(tiny, tmp_path, name, engine, message):
    with pytest.raises(ValueError, match=message):
        handed(tiny, name, engine, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_target_is_one_that_an_engine_finds_and_that_fits(tiny, tmp_path):
    known = replace(random_head("eagle3").target, name="target")
    source = str(write_head(replace(random_head("eagle3"), target=known), tmp_path / "head"))
    for given, message in (
        (None, "is 'target', where no engine finds it; .*--target"),
        ("demo", "hidden_size 160"),
    ):
        with pytest.raises(ValueError, match=message):
            export(source, "vllm", tmp_path / "out", target=given)
    with pytest.raises(ValueError, match="export dtype is 'f8' but must be one of 'auto'"):
        export("demo/draft", "vllm", tmp_path / "out", dtype="f8")
    with pytest.raises(ValueError, match="is not empty"):
        export(source, "vllm", source, target=str(tiny / "target"))


def test_command_prints_the_line_and_knows_engines_and_layouts(tmp_path):
    ask = ["export", "demo/eagle3", "--out", str(tmp_path / "out"), "--to"]
    refused = CliRunner().invoke(app, [*ask, "vlm"])
    assert (refused.exit_code, "did you mean 'vllm'" in refused.stderr) == (2, True)
    refused = CliRunner().invoke(app, ["export", "ngram", *ask[2:], "eagle3"])
    assert (refused.exit_code, "'ngram' is a ngram, no head" in refused.stderr) == (2, True)
    done = CliRunner().invoke(app, [*ask, "vllm"])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] + ' "$@"' in (tmp_path / "out/launch.sh").read_text()


@pytest.mark.slow
@pytest.mark.llamacpp
@pytest.mark.skipif(not ENGINE.exists(), reason="needs: bash scripts/engines.sh llamacpp")
def test_gguf_that_tokenizes_otherwise_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "_NAMES", {("Digits", "ByteLevel"): "gpt-2"})
    with pytest.raises(ValueError, match=r"tokenizes \d+ of 300 texts otherwise"):
        gguf.to_gguf(Path(DEMO), tmp_path / "wrong.gguf")
    monkeypatch.setattr(gguf, "_NAMES", {})
    with pytest.raises(RuntimeError, match="BPE pre-tokenizer was not recognized"):
        gguf.to_gguf(Path(DEMO), tmp_path / "unknown.gguf")
    monkeypatch.setenv("SPECDEC_GGUF_CONVERTER", str(tmp_path / "none.py"))
    with pytest.raises(ValueError, match=r"bash scripts/engines\.sh llamacpp"):
        gguf.to_gguf(Path(DEMO), tmp_path / "none.gguf")
