"""Hand a drafter to a serving engine: its files, the engine's config and the line that starts it.

A strategy's class says under which name an engine knows it (`engine_methods`), a layout which
engines read it (`engines`), and a head what an engine would drop (`unread`). Here is what each
engine wants to be told.
"""

import json
import shlex
import subprocess
import warnings
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import yaml
from pydantic import Field

from specdec.checkpoints import (
    HeadCheckpoint,
    TargetIdentity,
    check_target,
    head_of,
    identify_target,
)
from specdec.checkpoints.eagle import IDS
from specdec.checkpoints.find import find_drafter
from specdec.checkpoints.layouts import FOREIGN, LAYOUTS, write_head
from specdec.common.config import Config, validated, write_model
from specdec.common.distribution import install
from specdec.common.files import read_json, whole_folder
from specdec.demo import demo_path
from specdec.registry import closest, strategy
from specdec.targets.load import check_path, load_target, load_tokenizer

RECORD = "specdec-export.json"
ENGINES = ("vllm", "sglang", "tensorrt-llm", "llama.cpp", "transformers", "tabbyapi", "exllamav2")
# Scripts for engines without a server of their own.
_GENERATE = {
    "transformers": """\
import sys
from transformers import pipeline

told = {made.config!r}
drafter = told.pop("assistant_model")
generate = pipeline(
    "text-generation", {made.target!r}, dtype={made.dtype!r}, assistant_model=drafter
)
generate.assistant_model.generation_config.update(**told)
text = sys.argv[1] if sys.argv[1:] else "Hello"
print(generate(text, do_sample=False, max_new_tokens=128)[0]["generated_text"])
""",
    "exllamav2": """\
import sys
from exllamav2 import ExLlamaV2, ExLlamaV2Cache, ExLlamaV2Config, ExLlamaV2Tokenizer
from exllamav2.generator import ExLlamaV2DynamicGenerator

loaded = []
for name in "target", "drafter":
    model = ExLlamaV2(ExLlamaV2Config({made.folder!r} + f"/{{name}}-exl2"))
    loaded += [model, ExLlamaV2Cache(model, lazy=True)]
    model.load_autosplit(loaded[-1])
tokenizer = ExLlamaV2Tokenizer(loaded[0].config)
told = dict(zip(["model", "cache", "draft_model", "draft_cache"], loaded))
generator = ExLlamaV2DynamicGenerator(
    tokenizer=tokenizer, num_draft_tokens={made.num_tokens}, **told
)
print(generator.generate(sys.argv[1] if sys.argv[1:] else "Hello", max_new_tokens=128))
""",
}
_CONVERT = """\
#!/usr/bin/env bash
# EXL2 with 6 bits a weight. EXL3: python -m exllamav3.conversion.convert_model -i IN -w WORK -o OUT
set -euo pipefail
cd {folder}
convert() {{
    mkdir -p "$1-work"
    python -m exllamav2.conversion.convert_exl2 -i "$2" -o "$1-work" -cf "$1-exl2" -b 6.0
}}
convert target {target}
convert drafter {drafter}
"""


class Exported(Config):
    """A drafter as an engine was given it; paths are absolute.

    Attributes:
        kind: the drafter's name in the registry; `method` is the engine's name for it.
        drafter: folder, hub id or file that the engine loads; empty for lookups.
        folder: the folder that was written; `files` are in it.
        launch: words of the command that starts the engine's server, in `environment`.
        config: settings of the drafter under the engine's own names.
        note: a warning or a step to take before use; empty without one.
    """

    engine: str
    kind: str
    method: str
    drafter: str = ""
    target: str
    num_tokens: int = Field(ge=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    folder: str
    files: list[str] = Field(default_factory=list)
    launch: list[str] = Field(default_factory=list)
    environment: dict[str, str] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict)
    note: str = ""

    @property
    def command(self) -> str:
        """The command as a shell runs it."""
        variables = (f"{name}={shlex.quote(value)} " for name, value in self.environment.items())
        return "".join(variables) + shlex.join(self.launch)


def export(
    drafter: str | Mapping[str, Any],
    engine: str,
    out: str | Path,
    target: str | None = None,
    num_tokens: int = 5,
    dtype: str = "auto",
    revision: str | None = None,
) -> Exported:
    """Write what an engine needs to draft with a drafter, into a folder that is new or empty.

    Args:
        drafter: a head or a draft model by its folder or hub id, "demo/NAME", a registered name, or
            a strategy's options.
        engine: name in `ENGINES`.
        target: folder or hub id of the target; None for the one that the head names, and for the
            embedded one where the drafter is embedded or has no model.
        num_tokens: tokens drafted in a step, where the options do not say.
        dtype: the engine's compute dtype; "auto" leaves it to the engine.

    Raises:
        ValueError: the engine does not run such a drafter, or would drop a part of it.
    """
    if engine not in ENGINES:
        known = closest(engine, [*ENGINES, *LAYOUTS])
        raise ValueError(f"{engine!r} is no engine to export to; {known}")
    out = _new_folder(out)
    options, head = find_drafter(drafter, revision)
    kind = options["type"]
    methods = strategy(kind).engine_methods
    if engine not in methods:
        others = f"it is run by {', '.join(sorted(methods))}" if methods else "no engine runs it"
        raise ValueError(f"{engine} has no method for the drafter {kind!r}; {others}")
    about = {"engine": engine, "kind": kind, "method": methods[engine], "dtype": dtype}
    about |= {"target": _find_target(target, options.get("path"), head), "folder": str(out)}
    about |= {"num_tokens": options.get("num_draft_tokens", num_tokens)}
    made = validated(Exported, about, "export")
    with whole_folder(out) as partial:
        if head is not None:
            _write_head(made, head, partial)
        elif "path" in options:
            _write_model(made, options, partial)
        texts = _tell(made, options, partial)
        texts["launch.sh"] = f'#!/usr/bin/env bash\n{made.command} "$@"\n'
        for name, text in texts.items():
            (partial / name).write_text(text)
        made.files = sorted({*(each.name for each in partial.iterdir()), RECORD})
        write_model(partial / RECORD, made)
    if "convert.sh" in texts and torch.cuda.is_available():
        subprocess.run(["bash", str(out / "convert.sh")], check=True)
    return made


def export_layout(
    source: str, layout: str, out: str | Path, target: str | None, revision: str | None = None
) -> HeadCheckpoint:
    """Write a head in a layout, tensor for tensor; a target fills in what the head leaves to it."""
    out = _new_folder(out)
    options, head = find_drafter(source, revision)
    if head is None:
        raise ValueError(f"{source!r} is a {options['type']}, no head; name an engine instead")
    write_head(head if target is None else _completed(head, source, target), out, layout)
    return head


def _new_folder(out: str | Path) -> Path:
    out = Path(out).expanduser().resolve()
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{str(out)!r} is not empty; give a new folder")
    return out


def _find_target(target: str | None, drafter: str | None, head: HeadCheckpoint | None) -> str:
    """Find a target's absolute path, or its hub id: others do not share our working folder."""
    demo = demo_path("target").parent.resolve()
    if target is None and (drafter is None or Path(drafter).resolve().parent == demo):
        target = "demo"
    if target is None:
        target = head.target.name if head and head.target else None
        if target is None or "/" not in target:
            what = f"the target of {drafter!r} is {target or 'unknown'!r}, where no engine finds it"
            raise ValueError(f"{what}; give a folder or hub id (--target)")
    return _absolute(check_path(target))


def _absolute(path: str) -> str:
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def _write_head(made: Exported, head: HeadCheckpoint, folder: Path) -> None:
    """Write a head in a layout that the engine reads: its own, or the first that can hold it."""
    from transformers import AutoConfig

    whole = head_of(head)
    for name in whole.unread.get(made.engine, "").split():
        value = attrgetter(name)(whole.options) or 0
        if value is True or value > 1:
            plain = "false" if value is True else 1
            fix = f"train it without, drafter.options.{name}={plain}, or take another engine"
            raise ValueError(f"{made.engine} would drop, without a word, the head's {name}; {fix}")
    config = AutoConfig.from_pretrained(made.target)
    text = config.get_text_config()
    sizes = TargetIdentity(made.target, text.hidden_size, text.vocab_size, text.num_hidden_layers)
    check_target(head, sizes)
    known = head.target or sizes
    facts = {**(known.facts or {}), "architectures": config.architectures}
    known = replace(known, name=made.target, num_layers=sizes.num_layers, facts=facts)
    fits = [n for n, e in FOREIGN.items() if e.kind == head.kind and made.engine in e.engines]
    first, *others = sorted(fits, key=lambda name: (name != head.layout, name))
    try:
        write_head(replace(head, target=known), folder, first)
    except ValueError:
        if not others:
            raise
        write_head(replace(head, target=known), folder, others[0])
    made.drafter = made.folder
    made.num_tokens = min(made.num_tokens, whole.max_depth or made.num_tokens)


def _write_model(made: Exported, options: Mapping[str, Any], folder: Path) -> None:
    """Name a draft model that fits its target, or write it with its adapter merged."""
    tokenizer = load_tokenizer(made.target, None, False)
    target: Any = SimpleNamespace(device="cpu", vocab_size=0, tokenizer=tokenizer)
    path, adapter = options["path"], options.get("adapter")
    draft = strategy(made.kind).load(target, path, adapter, "auto").model
    made.drafter = made.folder if adapter else _absolute(path)
    if adapter:
        draft.model.save_pretrained(folder)
        draft.tokenizer.save_pretrained(folder)


def _completed(head: HeadCheckpoint, source: str, target: str) -> HeadCheckpoint:
    """The head with all options that its target settles, and the target's identity."""
    path = _find_target(target, source, head)
    model = load_target(path)
    identity = replace(identify_target(model), name=path)
    with warnings.catch_warnings(action="ignore"):  # an older identity is about to be renewed
        check_target(head, identity)
    facts = {**(identity.facts or {}), "architectures": model.model.config.architectures}
    whole = replace(head, target=replace(identity, facts=facts))
    options = head_of(whole, source).options.model_dump(exclude_none=True)
    return replace(whole, options=options)


def _tell(made: Exported, options: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Say what the engine is told and how it is started; returns texts of files by name."""

    def here(name: str) -> Path:
        is_here = name == made.folder or Path(name).is_dir()
        return Path(name if is_here else import_module("huggingface_hub").snapshot_download(name))

    drafter, num, config, texts = made.drafter, made.num_tokens, dict[str, Any](), dict[str, str]()
    match made.engine:
        case "vllm":
            model = drafter or "specdec.integrations.vllm.Proposer"
            config = {"method": made.method, "model": model, "num_speculative_tokens": num}
            if not drafter:
                made.environment = {"SPECDEC_DRAFTER": json.dumps(options)}
                made.note = f"specdec must be in vLLM's environment: {install(options='--no-deps')}"
            elif made.method == "medusa":
                made.note = "vLLM 0.32 is the last one with Medusa"
            # `vllm serve` does not start from the wheel for CPUs.
            made.launch = ["python", "-m", "vllm.entrypoints.openai.api_server"]
            flags = {"model": made.target, "dtype": made.dtype}
            flags["speculative-config"] = json.dumps(config)
        case "sglang":  # a chain, whose root is counted too
            config = {"speculative-algorithm": made.method, "speculative-draft-model-path": drafter}
            config |= {"speculative-num-steps": num, "speculative-eagle-topk": 1}
            config |= {"speculative-num-draft-tokens": num + 1}
            made.launch = ["python", "-m", "sglang.launch_server"]
            flags = {"model-path": made.target, "dtype": made.dtype, **config}
        case "tensorrt-llm":
            config = {"decoding_type": made.method, "max_draft_len": num}
            config["speculative_model"] = drafter
            if (head := folder / "config.json").exists() and (taps := read_json(head).get(IDS)):
                config["eagle3_layers_to_capture"] = [tap - 1 for tap in taps]
            config = {"dtype": made.dtype, "speculative_config": config}
            made.launch = ["trtllm-serve", made.target]
            flags = {"extra_llm_api_options": f"{made.folder}/extra_llm_api_options.yaml"}
            texts["extra_llm_api_options.yaml"] = yaml.safe_dump(config, sort_keys=False)
        case "llama.cpp":
            from specdec.engines.gguf import to_gguf

            target, made.target = here(made.target), f"{made.folder}/target.gguf"
            to_gguf(target, folder / "target.gguf", dtype=made.dtype)
            source = folder if drafter == made.folder else here(drafter)
            to_gguf(source, folder / "drafter.gguf", target, made.dtype)
            made.drafter = f"{made.folder}/drafter.gguf"
            config = {"spec-type": made.method, "spec-draft-model": made.drafter}
            config |= {"spec-draft-n-max": num, "spec-draft-p-min": 0}
            made.launch, flags = ["llama-server", "--metrics"], {"model": made.target, **config}
        case "transformers":  # the number of drafted tokens stays as it is
            config = {"assistant_model": drafter, "num_assistant_tokens": num}
            config |= {"num_assistant_tokens_schedule": "constant"}
            config |= {"assistant_confidence_threshold": 0.0}
        case "tabbyapi":
            for part, model in {"": made.target, "draft_": drafter}.items():
                at = here(model)
                about = {"model_dir": str(at.parent), "model_name": at.name, "cache_mode": "FP16"}
                config[f"{part}model"] = {part + name: value for name, value in about.items()}
            config["draft_model"] |= {"draft_mode": made.method, "draft_num_tokens": num}
            made.launch, flags = ["python", "main.py"], {"config": f"{made.folder}/config.yml"}
            made.note = "run it in TabbyAPI's folder; it loads EXL2 and EXL3, see --to exllamav2"
            texts["config.yml"] = yaml.safe_dump(config, sort_keys=False)
        case "exllamav2":
            config = {"target": str(here(made.target)), "drafter": str(here(drafter))}
            paths = {name: shlex.quote(model) for name, model in config.items()}
            texts["convert.sh"] = _CONVERT.format(folder=shlex.quote(made.folder), **paths)
    made.config = config
    if script := _GENERATE.get(made.engine):
        made.launch, flags = ["python", f"{made.folder}/generate.py"], {}
        texts["generate.py"] = script.format(made=made)
    made.launch += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return texts
