"""`specdec check`: the lossless suite on a drafter."""

import os
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import typer

from specdec.cli.app import MEASURE, argument, command, quiet_transformers
from specdec.common.distribution import install


class _Outcomes:
    """A plugin of pytest that counts checks, those skipped by their reasons."""

    def __init__(self) -> None:
        self.passed, self.failed, self.skipped = 0, 0, Counter[str]()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.skipped:
            self.skipped[report.longrepr[2].removeprefix("Skipped: ")] += 1
        self.failed += report.failed
        self.passed += report.passed and report.when == "call"

    def __str__(self) -> str:
        skipped = "; ".join(f"{number}: {reason}" for reason, number in self.skipped.items())
        told = [f"{self.passed} passed"]
        told += [f"{self.skipped.total()} skipped ({skipped})"] if skipped else []
        told += [f"{self.failed} FAILED: it changes the output, or breaks"] if self.failed else []
        return "lossless: " + ", ".join(told)


@command(MEASURE)
def check(
    drafter: str = argument("a name, pkg.module:Class, or JSON with type and options"),
) -> None:
    """Check that a drafter keeps the target's output, on tiny random models."""
    if find_spec("pytest") is None:
        raise ValueError(f"specdec check needs pytest; install it with: {install('check')}")
    import pytest

    import specdec.lossless as plugin
    from specdec.lossless.cases import case_of
    from specdec.lossless.models import tiny_target

    quiet_transformers()
    with TemporaryDirectory() as folder:  # bad input is told before anything is tested
        case_of(drafter).build(tiny_target(), Path(folder))
    outcomes = _Outcomes()
    options = ["-p", "no:cacheprovider", "-c", os.devnull, "--noconftest"]
    options += ["--disable-plugin-autoload", "--rootdir=.", "-q", "-rN", "--tb=short"]
    options += ["--no-header", "--disable-warnings"]
    given = ["--pyargs", "specdec.lossless", "--drafter", drafter]
    status = pytest.main([*options, *given], plugins=[plugin, outcomes])
    if status:
        raise RuntimeError(outcomes)
    typer.echo(outcomes)
