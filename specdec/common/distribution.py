"""The name that pip knows this package by; `specdec` on PyPI is another project."""

from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "specdec-lab"


def install(extra: str = "", options: str = "") -> str:
    """Return the command that installs this package, with an extra if one is named."""
    wanted = f"'{DISTRIBUTION}[{extra}]'" if extra else DISTRIBUTION
    return " ".join(["pip install", *([options] if options else []), wanted])


def installed_version(package: str = DISTRIBUTION) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
