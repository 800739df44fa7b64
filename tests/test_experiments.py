"""Experiments are whole, their configurations load, and tables say what the results say."""

import re
import subprocess
from pathlib import Path

import pytest

from specdec.bench.config import load_cells
from specdec.engines.bake_off import load_bake_off

ROOT = Path(__file__).parents[1]
HERE = ROOT / "experiments"
NAMES = sorted(path.name for path in HERE.glob("[01][0-9]-*") if path.name[:2] >= "05")
MEASURED = [name for name in NAMES if list((HERE / name).glob("*.json"))]
TRAINING = {"07-draft-size/train.yaml", "16-drafters/train.yaml"}
CONFIGS = sorted(
    str(path.relative_to(HERE))
    for name in NAMES
    for path in (HERE / name).glob("*.yaml")
    if str(path.relative_to(HERE)) not in TRAINING
)


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    import tables

    return tables


def readme(name):
    return (HERE / name / "README.md").read_text()


# Every README with tables of speeds, that of the repository among them.
WITH_TABLES = ["..", "01-core", "02-heads", "03-domain", "04-recipes", *MEASURED]


def test_there_are_twelve_experiments_of_one_form():
    assert [name[:2] for name in NAMES] == [f"{number:02}" for number in range(5, 17)]


def test_the_index_lists_every_experiment_once_and_by_its_question():
    index = (HERE / "README.md").read_text()
    rows = re.findall(
        r"^\| \[(\S+)\]\((\S+)/README\.md\) \| (.+?) \| (.+?) \| (.+?) \|$", index, re.M
    )
    folders = sorted(path.parent.name for path in HERE.glob("*/README.md"))
    assert [row[0] for row in rows] == [row[1] for row in rows] == folders
    for name, _, question, *_ in rows:
        assert readme(name).splitlines()[0] == f"# {question}"


@pytest.mark.parametrize("name", MEASURED)
def test_an_experiment_has_all_its_parts(name):
    text = readme(name)
    assert text.splitlines()[0].startswith("# ")
    assert text.splitlines()[0].endswith("?")
    for section in ("Command", "Results", "Conclusions", "Limits"):
        assert len(text.split(f"\n## {section}\n")) == 2, section
    assert f"bash experiments/run_all.sh {name}\n" in text
    assert "![" in text
    assert "(plot.png)" in text
    assert "DRAFT" not in text
    assert "Not measured yet" not in text
    assert (HERE / name / "plot.png").stat().st_size > 10_000
    is_configured = any((HERE / name).glob(f"*.{kind}") for kind in ("yaml", "py"))
    assert is_configured or "specdec bench demo/" in text


def test_an_experiment_without_results_concludes_nothing():
    for name in set(NAMES) - set(MEASURED):
        assert "\n## Conclusions\n\nNot measured yet" in readme(name)


@pytest.mark.parametrize("name", MEASURED)
def test_what_a_readme_links_to_is_there(name):
    for link in re.findall(r"\]\(([^)#]+)\)", readme(name)):
        assert link.startswith("https://") or (HERE / name / link).exists(), link


@pytest.mark.parametrize("name", WITH_TABLES)
def test_tables_say_what_the_committed_results_say(name, tables):
    text = readme(name)
    assert tables.filled(text, tables.TABLES[name]()) == text


@pytest.mark.parametrize("name", WITH_TABLES)
def test_a_readme_shows_every_table_that_is_made(name, tables):
    shown = re.findall(r"<!-- table (\S+) -->", readme(name))
    assert sorted(shown) == sorted(tables.TABLES[name]())


def test_a_table_that_was_edited_is_noticed(tables):
    text = "<!-- table a -->\n| 1 |\n<!-- end of table -->\n"
    assert tables.filled(text, {"a": "| 2 |"}) != text
    assert tables.filled(text, {"a": "| 1 |"}) == text


@pytest.mark.parametrize("path", CONFIGS)
def test_configurations_load(path):
    if path == "15-engines/bake-off.yaml":
        assert len(load_bake_off(str(HERE / path)).endpoints) == 9
        return
    for cell in load_cells(str(HERE / path)):
        assert cell.config.arms


KEYS = ("steps", "accepted")


def test_domains_of_a_sweep_are_those_of_its_taus(tables):
    for cell in tables.read("05-drafters/sweep.json").cells:
        for arm in cell.arms:
            for place, figures in enumerate(arm.domains.values()):
                each = arm.per_prompt[place :: len(arm.domains)]
                steps, accepted = (sum(getattr(row, key) for row in each) for key in KEYS)
                if steps:
                    assert figures.tau == pytest.approx(1 + accepted / steps)


def test_the_script_runs_every_experiment():
    script = (HERE / "run_all.sh").read_text()
    (names,) = re.findall(r"^all=\((.*)\)$", script, re.M)
    assert names.split() == ["01-core", "02-heads", "04-recipes", *NAMES]
    subprocess.run(["bash", "-n", str(HERE / "run_all.sh")], check=True)


def test_the_script_refuses_a_name_that_is_none():
    done = subprocess.run(
        ["bash", str(HERE / "run_all.sh"), "12-none"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no experiment 12-none" in done.stderr
