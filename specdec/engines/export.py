"""Hand a drafter to a serving engine: its files, the engine's config and the line that starts it.

A strategy's class says under which name an engine knows it (`engine_methods`), a layout which
engines read it (`engines`), and a head what an engine would drop (`lost_in`). Here is what each
engine wants to be told.
"""

import json
import shlex
import subprocess
import warnings
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from jinja2 import Environment
from pydantic import Field

from specdec.checkpoints import HeadCheckpoint, TargetIdentity, check_target, head_of, read_head
from specdec.checkpoints.eagle import IDS
from specdec.checkpoints.layouts import FOREIGN, LAYOUTS, write_head
from specdec.common.config import Config, write_model
from specdec.common.files import parse_json, read_json, whole_folder
from specdec.common.hub import find_checkpoint
from specdec.demo import demo_path
from specdec.registry import DRAFTERS, closest, strategy

RECORD, LAUNCH = "specdec-export.json", "launch.sh"
_TOLD = Environment(trim_blocks=True, lstrip_blocks=True).from_string(
    Path(__file__).with_name("engines.yaml.jinja").read_text(encoding="utf-8")
)
ENGINES = ("vllm", "sglang", "tensorrt-llm", "llama.cpp", "transformers", "tabbyapi", "exllamav2")


class Exported(Config):
    """A drafter as an engine was given it; paths are absolute.

    Attributes:
        kind: the drafter's name in the registry; `method` is the engine's name for it.
        drafter: folder, hub id or file that the engine loads; empty for lookups.
        folder: the folder that was written; `files` are in it.
        launch: words of the command that starts the engine's server, in `environment`.
        config: what the engine is told of the drafter, under its own names.
        note: what to know before it is used.
    """

    engine: str
    kind: str
    method: str
    drafter: str = ""
    target: str
    num_tokens: int
    dtype: str
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
        dtype: what the engine computes in; "auto" leaves it to the engine.

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
    made = Exported(
        **{"engine": engine, "kind": kind, "method": methods[engine], "dtype": dtype},
        target=_find_target(target, options.get("path"), head),
        num_tokens=options.get("num_draft_tokens", num_tokens),
        folder=str(out),
    )
    with whole_folder(out) as partial:
        if head is not None:
            _write_head(made, head, partial)
        elif "path" in options:
            _write_model(made, options, partial)
        texts = _tell(made, options, partial)
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


def find_drafter(
    drafter: str | Mapping[str, Any], revision: str | None = None
) -> tuple[dict[str, Any], HeadCheckpoint | None]:
    """Find the options of a drafter that is named in any way, and its head if it has one."""
    if isinstance(drafter, str):
        is_json, key = drafter.startswith("{"), "type" if drafter in DRAFTERS else "path"
        drafter = parse_json(drafter) if is_json else {key: drafter}
    kind, path = drafter.get("type"), str(drafter.get("path", "demo"))
    if kind and not strategy(kind).trained_as:
        return dict(drafter), None
    if path == "demo":
        path = f"demo/{str(kind).removesuffix('_model')}"
    if path.startswith("demo/") and not Path(path).exists():
        path = str(demo_path(path.removeprefix("demo/")))
    options, folder = {**drafter, "path": path}, Path(path).expanduser()
    if kind is None and (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json")["base_model_name_or_path"]
        return {"type": "draft_model", "path": base, "adapter": path}, None
    # A head has no tokenizer of its own; Medusa's may lie beside its target.
    is_model = (folder / "tokenizer_config.json").is_file()
    is_model = is_model and not any(folder.glob("medusa_lm_head.*"))
    if is_model or (kind and not strategy(kind).head_class):
        return {"type": "draft_model", **options}, None
    try:
        head = read_head(path, revision)
    except ValueError as error:
        if folder.is_dir() or "no head" not in str(error):
            raise
        return {"type": "draft_model", **options}, None
    return {**options, "type": head.kind}, head


def _find_target(target: str | None, drafter: str | None, head: HeadCheckpoint | None) -> str:
    """Find a target's absolute path, or its hub id: others do not share our working folder."""
    demo = demo_path("target").resolve()
    if target is None and (drafter is None or Path(drafter).resolve().parent == demo.parent):
        target = "demo"
    if target is None:
        target = head.target.name if head and head.target else None
        if target is None or "/" not in target:
            what = f"the target of {drafter!r} is {target or 'unknown'!r}, where no engine finds it"
            raise ValueError(f"{what}; give a folder or hub id (--target)")
    found = str(demo) if target == "demo" else find_checkpoint(target, "the target's folder")
    return str(Path(found).resolve()) if Path(found).is_dir() else found


def _write_head(made: Exported, head: HeadCheckpoint, folder: Path) -> None:
    """Write a head in a layout that the engine reads: its own, or the first that can hold it."""
    from transformers import AutoConfig

    whole = head_of(head)
    if lost := whole.lost_in(made.engine):
        raise ValueError(f"{made.engine} would drop, without a word, {lost}")
    config = AutoConfig.from_pretrained(made.target)
    text = config.get_text_config()
    sizes = TargetIdentity(made.target, text.hidden_size, text.vocab_size, text.num_hidden_layers)
    check_target(head, sizes)
    known = head.target or sizes
    facts = {**(known.facts or {}), "architectures": config.architectures}
    known = replace(known, name=made.target, num_layers=sizes.num_layers, facts=facts)
    head, failure = replace(head, target=known), None
    for layout in sorted(FOREIGN, key=lambda name: (name != head.layout, name)):
        if FOREIGN[layout].kind == head.kind and made.engine in FOREIGN[layout].engines:
            try:
                write_head(head, folder, layout)
                break
            except ValueError as error:
                failure = failure or error
    else:
        raise failure or ValueError(f"{made.engine} reads no layout of the kind {head.kind!r}")
    made.drafter = made.folder
    made.num_tokens = min(made.num_tokens, whole.max_depth or made.num_tokens)


def _write_model(made: Exported, options: Mapping[str, Any], folder: Path) -> None:
    """Name a draft model that fits its target, or write it with its adapter merged."""
    from specdec.targets.load import load_tokenizer

    tokenizer = load_tokenizer(made.target, None, False)
    target: Any = SimpleNamespace(device="cpu", vocab_size=0, tokenizer=tokenizer)
    path, adapter = options["path"], options.get("adapter")
    draft = strategy(made.kind).load(target, path, adapter, "auto").model
    made.drafter = str(Path(path).resolve()) if Path(path).is_dir() else path
    if adapter:
        draft.model.save_pretrained(folder)
        draft.tokenizer.save_pretrained(folder)
        made.drafter = made.folder


def _completed(head: HeadCheckpoint, source: str, target: str) -> HeadCheckpoint:
    """The head with all options that its target settles, and the target's identity."""
    from specdec.checkpoints import identify_target
    from specdec.targets.load import load_target

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
    """Fill in what the engine is told, and return the texts of files by name."""

    def here(name: str) -> str:
        is_here = name == made.folder or Path(name).is_dir()
        return name if is_here else import_module("huggingface_hub").snapshot_download(name)

    config = folder / "config.json"
    taps = read_json(config).get(IDS, []) if config.exists() else []
    values = {"made": made, "options": options, "layers": [tap - 1 for tap in taps], "here": here}
    values |= {"dtype": {} if made.dtype == "auto" else {"dtype": made.dtype}, "path": Path}
    values |= {"flags": lambda told: [w for k, v in told.items() for w in (f"--{k}", str(v))]}
    values["json"] = json.dumps
    block = _TOLD.blocks[made.engine.replace("-", "_").replace(".", "_")]
    told = yaml.safe_load("".join(block(_TOLD.new_context(values))))
    if models := told.pop("gguf", None):
        from specdec.engines.gguf import to_gguf

        target = Path(models["target"])
        to_gguf(target, folder / "target.gguf", None, made.dtype)
        if source := models["drafter"]:
            source = folder if source == made.folder else Path(source)
            of_target = None if (source / "tokenizer_config.json").exists() else target
            to_gguf(source, folder / "drafter.gguf", of_target, made.dtype)
    texts, file = told.pop("files", {}), told.pop("config_file", None)
    if not (made.drafter or "environment" in told):
        told = {"note": "the engine's own lookup, which accepts other tokens than ours", **told}
    for name, value in told.items():
        setattr(made, name, value)
    if file:
        texts[file] = yaml.safe_dump(made.config, sort_keys=False)
    return texts | {LAUNCH: f'#!/usr/bin/env bash\n{made.command} "$@"\n'}
