"""`specdec drafters` and `env`: what there is to use, and what is installed here."""

import inspect
import os
import platform

import typer

from specdec.cli.app import MEASURE, app, argument, command, tell
from specdec.common.distribution import DISTRIBUTION, installed_version
from specdec.report.tables import Column, Table, print_tables

PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "accelerate"),
    *("datasets", "peft", "bitsandbytes", "matplotlib", "httpx", "starlette", "prometheus-client"),
    *("exllamav2", "exllamav3", "vllm"),
)


@app.callback(invoke_without_command=True)
def version(
    show: bool = typer.Option(False, "--version", help="Print the version and stop."),
) -> None:
    """Speculative decoding: generate text, measure draft strategies, train and hand over."""
    if show:
        typer.echo(f"{DISTRIBUTION} {installed_version()}")
        raise typer.Exit


@command(MEASURE, tells=True)
def drafters(
    name: str | None = argument("a strategy whose options are shown; all are listed if none", None),
) -> None:
    """List the draft strategies, or one's options with type, default and meaning."""
    from specdec.drafters.options import describe_options
    from specdec.registry import addresses, strategy

    if name is None:
        rows = [{"name": kind, "about": _about(kind)} for kind in sorted(addresses())]
        columns = [Column("name", "name"), Column("about", "what it does")]
        print_tables(Table("strategies", "draft strategies", rows, columns))
        tell({row["name"]: row["about"] for row in rows}, only_asked=True)
        return
    strategy(name, typed=True)
    options = [each._asdict() for each in describe_options(name)]
    columns = [Column(key, key) for key in ("name", "type", "default", "meaning")]
    if options:
        print_tables(Table("options", f"{name}: {_about(name)}", options, columns))
    else:
        typer.echo(f"{name}: {_about(name)} It has no options.")
    tell({"name": name, "options": options}, only_asked=True)


def _about(kind: str) -> str:
    from specdec.registry import strategy

    try:
        return (inspect.getdoc(strategy(kind)) or "").split("\n\n")[0].replace("\n", " ")
    except ValueError as error:  # of somebody's package
        return str(error)


@command(MEASURE, tells=True)
def env() -> None:
    """Print what a bug report needs: versions, machine, devices and settings."""
    import torch

    from specdec.common.compile import compiler

    facts = {
        DISTRIBUTION: installed_version(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores, load": f"{os.cpu_count()}, {os.getloadavg()[0]:.1f}",
        "threads": str(torch.get_num_threads()),
        "C++ compiler": compiler() or "none",
        "CUDA": f"{torch.version.cuda}, {torch.cuda.device_count()} devices",
    }
    for index in range(torch.cuda.device_count()):
        facts[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    facts |= {name: installed_version(name) for name in PACKAGES}
    known = ("OMP_", "HF_", "SPECDEC_", "TORCHINDUCTOR_", "CUDA_VISIBLE", "TOKENIZERS_")
    # Values of keys and tokens stay here.
    settings = [name for name in sorted(os.environ) if name.startswith(known)]
    facts |= {name: os.environ[name] for name in settings if not name.endswith(("KEY", "TOKEN"))}
    for name, value in facts.items():
        typer.echo(f"{name}: {value}")
    tell(facts, only_asked=True)
