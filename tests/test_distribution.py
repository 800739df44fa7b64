"""The name that pip knows: every hint is of this package, and says what an extra is called."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import specdec
from specdec.common.distribution import DISTRIBUTION, install

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
TEXTS = (".py", ".md", ".yaml", ".jinja", ".sh", ".toml", ".ipynb")


def tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = [name for name in listed.stdout.splitlines() if name.endswith(TEXTS)]
    return [ROOT / name for name in names if not name.startswith("experiments/")]


def test_the_constant_is_the_distribution():
    assert PROJECT["name"] == DISTRIBUTION != "specdec"
    assert specdec.__version__ == PROJECT["version"]
    assert install("plot") == f"pip install '{DISTRIBUTION}[plot]'"
    assert install(options="--no-deps") == f"pip install --no-deps {DISTRIBUTION}"


def test_no_text_names_a_foreign_distribution():
    """`specdec[...]` or `pip install specdec` would bring, or replace this package by, another."""
    wrong = re.compile(r"(?<![\w-])specdec\[\w|install (?:-\S+ )*['\"]?specdec['\"\s`)]")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in tracked()
        if path != Path(__file__)
        for line in path.read_text().splitlines()
        if wrong.search(line)
    ]
    assert not found


def test_hints_name_extras_that_exist():
    named = {
        (path, extra)
        for path in tracked()
        for words in (*re.findall(rf"{DISTRIBUTION}\[([\w,]+)\]", path.read_text()),)
        for extra in words.split(",")
    }
    named |= {
        (path, extra)
        for path in tracked()
        if path.suffix == ".py"
        for extra in re.findall(r"\binstall\(['\"](\w+)['\"]\)", path.read_text())
    }
    assert named
    assert not [(str(path), extra) for path, extra in named if extra not in EXTRAS]


@pytest.mark.parametrize("extra", sorted(set(EXTRAS) - {"dev", "docs"}))
def test_an_extra_has_code(extra):
    """Some package of every extra is imported, or named to a library that imports it."""
    if extra == "all":
        assert all(
            part in EXTRAS[extra][0] for part in set(EXTRAS) - {"all", "dev", "docs", "exllama"}
        )
        return
    code = "\n".join(path.read_text() for path in (ROOT / "specdec").rglob("*.py"))
    packages = [re.split(r"[<>=\[]", wanted)[0] for wanted in EXTRAS[extra]]
    modules = {"python-stdnum": "stdnum", "prometheus-client": "prometheus_client"}
    missing = [name for name in packages if modules.get(name, name) not in code]
    assert not missing
