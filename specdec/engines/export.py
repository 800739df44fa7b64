"""Hand a drafter to a serving engine: its files, the engine's config and the line that starts it.

A strategy's class says under which name an engine knows it (`engine_methods`), a layout which
engines read it (`engines`), and a head what an engine would drop (`lost_in`). Here is what an
engine wants to be told.
"""

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from specdec.checkpoints import HeadCheckpoint, TargetIdentity, check_target, head_of, read_head
from specdec.checkpoints.eagle import IDS
from specdec.checkpoints.layouts import FOREIGN, write_head
from specdec.common.config import Config, write_model
from specdec.common.files import parse_json, read_json, whole_folder
from specdec.common.hub import find_checkpoint
from specdec.demo import demo_path
from specdec.registry import DRAFTERS, closest, strategy

RECORD, LAUNCH = "specdec-export.json", "launch.sh"


class Exported(Config):
    """A drafter as an engine was given it.

    Attributes:
        engine: name in `ENGINES`.
        kind: the drafter's name in the registry.
        method: the engine's name for it.
        drafter: folder, hub id or file that the engine loads; empty for lookups.
        target: folder, hub id or file of the target.
        num_tokens: tokens drafted in a step.
        dtype: what the engine computes in; "auto" leaves it to the engine.
        folder: the folder that was written, which holds `files`.
        files: names in it.
        launch: words of the command that starts the engine's server.
        environment: variables that the command needs.
        config: what the engine is told of the drafter, as its own option or file says it.
        notes: what to know before it is used.
    """

    engine: str
    kind: str
    method: str
    drafter: str
    target: str
    num_tokens: int
    dtype: str
    folder: str
    files: list[str] = Field(default_factory=list)
    launch: list[str] = Field(default_factory=list)
    environment: dict[str, str] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)

    @property
    def command(self) -> str:
        """The command as a shell runs it."""
        return " ".join(
            [f"{k}={shlex.quote(v)}" for k, v in self.environment.items()]
            + [shlex.quote(word) for word in self.launch]
        )


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
        dtype: what the engine computes in; "auto" leaves it to the engine.
        revision: branch, tag or commit of a drafter's hub id.

    Raises:
        ValueError: the engine does not run such a drafter, or would drop a part of it.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}, which is not known; {closest(engine, [*ENGINES])}")
    out = _new_folder(out)
    options, head = find_drafter(drafter, revision)
    kind, path = options["type"], options.get("path", "demo")
    methods = strategy(kind).engine_methods
    if engine not in methods:
        others = f"it is run by {', '.join(sorted(methods))}" if methods else "no engine runs it"
        raise ValueError(f"{engine} has no method for the drafter {kind!r}; {others}")
    known = head.target.name if head and head.target else None
    is_demo = path == "demo" or Path(path).resolve().parent == demo_path("target").resolve().parent
    made = Exported(
        engine=engine,
        kind=kind,
        method=methods[engine],
        drafter="",
        target=_find_target(target, known, is_demo=is_demo),
        num_tokens=options.get("num_draft_tokens", num_tokens),
        dtype=dtype,
        folder=str(out),
    )
    with whole_folder(out) as partial:
        if head is not None:
            _write_head(made, head, partial)
        elif strategy(kind).trained_as:
            _write_model(made, options, partial)
        texts = ENGINES[engine](made, options, partial)
        texts[LAUNCH] = "#!/usr/bin/env bash\n" + "".join(f"# {note}\n" for note in made.notes)
        texts[LAUNCH] += f'{made.command} "$@"\n'
        for name, text in texts.items():
            (partial / name).write_text(text)
        made.files = sorted({*(each.name for each in partial.iterdir()), RECORD})
        write_model(partial / RECORD, made)
    return made


def export_layout(
    source: str, layout: str, out: str | Path, target: str | None, revision: str | None = None
) -> HeadCheckpoint:
    """Write a head in a layout, tensor for tensor; a target fills in what the head leaves to it."""
    out = _new_folder(out)
    options, head = find_drafter(source, revision)
    if head is None:
        raise ValueError(
            f"{source!r} is a {options['type']}, and {layout!r} is a layout of heads; give --to an "
            f"engine, one of {', '.join(ENGINES)}"
        )
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
    """The options of a drafter that is named in any way, and its head if it has one."""
    if isinstance(drafter, str) and drafter.startswith("{"):
        drafter = parse_json(drafter)
    if isinstance(drafter, str) and drafter in DRAFTERS:
        drafter = {"type": drafter}
    if not isinstance(drafter, str):
        options = dict(drafter)
        found = strategy(options.get("type"))
        if not found.head_class:
            return options, None
        path = options.get("path", "demo")
        path = str(demo_path(options["type"])) if path == "demo" else path
        return options, read_head(path, revision)
    name = drafter.removeprefix("demo/")
    path = str(demo_path(name)) if drafter != name and not Path(drafter).exists() else drafter
    folder = Path(path).expanduser()
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json")["base_model_name_or_path"]
        return {"type": "draft_model", "path": base, "adapter": path}, None
    # Heads draft in their target's tokens and have no tokenizer of their own.
    is_model = (folder / "tokenizer_config.json").is_file()
    if is_model and not (any(folder.glob("medusa*")) or (folder / "specdec.json").exists()):
        return {"type": "draft_model", "path": path}, None
    try:
        head = read_head(path, revision)
    except ValueError as error:
        if folder.is_dir() or "no head" not in str(error):
            raise
        return {"type": "draft_model", "path": path}, None
    return {"type": head.kind, "path": path}, head


def _find_target(target: str | None, known: str | None, *, is_demo: bool) -> str:
    """An absolute path or a hub id, for others do not share our working folder."""
    if target is None and not is_demo:
        if known is None or "/" not in known:
            told = (
                f"names its target {known!r}, which no engine can find"
                if known
                else "names no target"
            )
            raise ValueError(f"the drafter {told}; give --target, a folder or hub id")
        target = known
    if target in (None, "demo"):
        return str(demo_path("target").resolve())
    found = Path(find_checkpoint(str(target), "the target's folder"))
    return str(found.resolve()) if found.is_dir() else str(found)


def _write_head(made: Exported, head: HeadCheckpoint, folder: Path) -> None:
    """Write a head in a layout that the engine reads: its own, or the first that can hold it."""
    from transformers import AutoConfig

    if lost := head_of(head).lost_in(made.engine):
        raise ValueError(f"{made.engine} would drop, without a word, {lost}")
    whole = AutoConfig.from_pretrained(made.target)
    text = whole.get_text_config()
    sizes = TargetIdentity(made.target, text.hidden_size, text.vocab_size, text.num_hidden_layers)
    check_target(head, sizes)
    facts = {**((head.target and head.target.facts) or {}), "architectures": whole.architectures}
    told = {k: v for k, v in asdict(sizes).items() if v is not None}
    head = replace(head, target=replace(head.target or sizes, **told, facts=facts))
    fit = [
        n for n, kind in FOREIGN.items() if kind.kind == head.kind and made.engine in kind.engines
    ]
    fit.sort(key=lambda name: (name != head.layout, name))
    failure = None
    for layout in fit:
        try:
            write_head(head, folder, layout)
            break
        except ValueError as error:
            failure = failure or error
    else:
        raise failure or AssertionError(f"{made.engine} reads no layout of {head.kind}")
    depth = head_of(head).max_depth
    made.drafter, made.num_tokens = made.folder, min(made.num_tokens, depth or made.num_tokens)


def _write_model(made: Exported, options: Mapping[str, Any], folder: Path) -> None:
    """Name a draft model, or write it with its adapter merged."""
    from specdec.drafters.draft_model import check_same_tokenizer, load_adapter
    from specdec.targets.load import load_target, load_tokenizer

    path = options.get("path", "demo")
    path = str(demo_path("draft")) if path == "demo" else find_checkpoint(path, "a draft model")
    made.drafter = str(Path(path).resolve()) if Path(path).is_dir() else path
    draft, target = (load_tokenizer(each, None, False) for each in (path, made.target))
    check_same_tokenizer(draft, target, path)
    if adapter := options.get("adapter"):
        model = load_target(path, dtype="auto")
        load_adapter(model.model, adapter).merge_and_unload().save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        made.drafter = made.folder


def _completed(head: HeadCheckpoint, source: str, target: str) -> HeadCheckpoint:
    """The head with all options that its target settles, and the target's identity."""
    import warnings

    from specdec.checkpoints import identify_target
    from specdec.drafters.heads import build_head, fill_head
    from specdec.targets.load import load_target

    model = load_target(_find_target(target, None, is_demo=False))
    identity = identify_target(model)
    with warnings.catch_warnings(action="ignore"):  # an older identity is about to be renewed
        check_target(head, identity)
    module = build_head(head.kind, head.options, model)
    fill_head(module, head.tensors, source)
    options = module.options.model_dump(exclude_none=True)
    return replace(head, options=options, target=identity)


# What each engine is told. Each function fills `config`, `launch` and `notes`, and returns texts of
# files by name.
Texts = dict[str, str]


def _vllm(made: Exported, options: Mapping[str, Any], folder: Path) -> Texts:
    model = made.drafter or "specdec.integrations.vllm.Proposer"
    made.config = {"method": made.method, "model": model}
    made.config["num_speculative_tokens"] = made.num_tokens
    made.launch = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", made.target]
    made.launch += [*_dtype(made), "--speculative-config", json.dumps(made.config)]
    if not made.drafter:
        made.environment = {"SPECDEC_DRAFTER": json.dumps(dict(options))}
        made.notes.append("specdec must be installed in vLLM's environment: pip install --no-deps")
    if made.kind == "medusa":
        made.notes.append("vLLM 0.32 is the last one with Medusa")
    return {"speculative_config.json": json.dumps(made.config, indent=1) + "\n"}


def _sglang(made: Exported, options: Mapping[str, Any], folder: Path) -> Texts:
    made.config = {"speculative-algorithm": made.method}
    if made.drafter:
        # A chain, as everywhere else; a tree needs another backend and other numbers.
        made.config |= {"speculative-draft-model-path": made.drafter}
        made.config |= {"speculative-num-steps": made.num_tokens, "speculative-eagle-topk": 1}
        made.config |= {"speculative-num-draft-tokens": made.num_tokens + 1}
    else:
        made.config |= {"speculative-num-draft-tokens": made.num_tokens}
        made.notes.append(_OTHER_LOOKUP)
    flags = [word for key, value in made.config.items() for word in (f"--{key}", str(value))]
    made.launch = ["python", "-m", "sglang.launch_server", "--model-path", made.target]
    made.launch += [*_dtype(made), *flags]
    return {}


def _tensorrt_llm(made: Exported, options: Mapping[str, Any], folder: Path) -> Texts:
    told: dict[str, Any] = {"decoding_type": made.method, "max_draft_len": made.num_tokens}
    if made.drafter:
        told["speculative_model"] = made.drafter
    if taps := made.kind == "eagle3" and read_json(folder / "config.json").get(IDS):
        told["eagle3_layers_to_capture"] = [tap - 1 for tap in taps]  # counted by their outputs
    made.config = {"speculative_config": told}
    if made.dtype != "auto":
        made.config["dtype"] = made.dtype
    file = "extra_llm_api_options.yaml"
    made.launch = ["trtllm-serve", made.target, "--extra_llm_api_options", f"{made.folder}/{file}"]
    return {file: yaml.safe_dump(made.config, sort_keys=False)}


def _llama_cpp(made: Exported, options: Mapping[str, Any], folder: Path) -> Texts:
    from specdec.engines.gguf import to_gguf

    target, drafter = _here(made.target), made.drafter and _here(made.drafter, folder, made.folder)
    to_gguf(target, folder / "target.gguf", dtype=made.dtype)
    made.target, made.config = f"{made.folder}/target.gguf", {"spec-type": made.method}
    if drafter:
        to_gguf(
            drafter,
            folder / "drafter.gguf",
            target if made.kind != "draft_model" else None,
            made.dtype,
        )
        made.drafter = f"{made.folder}/drafter.gguf"
        made.config |= {"spec-draft-model": made.drafter, "spec-draft-n-max": made.num_tokens}
        made.config |= {"spec-draft-p-min": 0}
    else:
        made.config |= {"spec-ngram-simple-size-n": options.get("max_ngram", 4)}
        made.config |= {"spec-ngram-simple-size-m": made.num_tokens}
        made.notes.append(_OTHER_LOOKUP)
    flags = [word for key, value in made.config.items() for word in (f"--{key}", str(value))]
    made.launch = ["llama-server", "--model", made.target, *flags, "--metrics"]
    return {}


def _dtype(made: Exported) -> list[str]:
    return [] if made.dtype == "auto" else ["--dtype", made.dtype]


def _here(name: str, partial: Path | None = None, folder: str = "") -> Path:
    """A model's folder on this machine; one that is being written is still at `partial`."""
    if partial is not None and name == folder:
        return partial
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name))


_OTHER_LOOKUP = "this is the engine's own lookup, which accepts other tokens than specdec's"
ENGINES: dict[str, Callable[[Exported, Mapping[str, Any], Path], Texts]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "tensorrt-llm": _tensorrt_llm,
    "llama.cpp": _llama_cpp,
}
