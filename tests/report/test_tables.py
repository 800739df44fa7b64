"""Tables in a terminal: nothing is cut off at any width, and figures are those of the results."""

import os
import pty
import subprocess
import sys
from copy import deepcopy
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import made_runs
import pytest
from rich.console import Console

from specdec.analysis.results import Analysis
from specdec.bench.results import BenchResults, SuiteResults, SweepResults
from specdec.cli.data import _table
from specdec.data.collect import REASONS, Drop
from specdec.report.analysis import analysis_table
from specdec.report.bench import sweep_table, tables
from specdec.report.plan import costs_table, estimate_table, plan_table, schedule_table
from specdec.report.runs import read_runs
from specdec.report.tables import Column, Table

WIDTHS = (80, 100, 160)
SNAPSHOTS = Path(__file__).parent / "snapshots"
SUITES = ["single-turn", "multi-turn", "long-context", "concurrent"]


def lines(table, width):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table.fit(width))
    found = [line.rstrip() for line in console.export_text().splitlines()]
    assert max(map(len, found)) <= width
    assert not any("…" in line for line in found)
    return found


def bench_lines(width, change=lambda arms: None, where=None):
    content = made_runs.bench()
    content["provenance"] |= where or {}
    content["arms"][-1]["name"] = "lookup"
    change(content["arms"])
    return lines(*tables(BenchResults.read(content)), width)


@pytest.mark.parametrize(("width", "num_intervals"), [(80, 0), (100, 1), (140, 3)])
def test_table_gives_up_intervals_before_cutting(width, num_intervals):
    text = bench_lines(width)
    rows = [line for line in text if line.startswith("lookup")]
    assert sum(row.count("[") for row in rows) == num_intervals
    figures = " ".join(rows).replace("lookup", "").split()
    assert figures[-2:] == ["0", "0"]
    assert len(rows) == (1 if width > 80 else 2), "columns are split only where they must be"
    assert any(line.startswith("eagle3 chain 4 ") for line in text)


def test_long_name_goes_on_in_next_line():
    name = "a head with many nodes and an adapter"
    text = "\n".join(bench_lines(80, lambda arms: arms[2].update(name=name)))
    assert all(word in text for word in name.split())


def test_caption_says_how_near_ties_were():
    def differ(arms):
        difference = {"prompt": 0, "against": "plain", "position": 1}
        gaps = (0.02, 0.03125, None)
        arms[2]["differences"] = [difference | {"top2_gap": gap} for gap in gaps]

    assert not any("apart" in line for line in bench_lines(140))
    assert any("0.031 apart" in line for line in bench_lines(140, differ))


def test_ratio_over_the_fastest_plain_arm_comes_first():
    def faster(arms):
        arms[1] |= {"decode_tokens_per_s": 1e6}
        arms[-1] |= {"speedup_vs_hf": 0.125, "speedup_vs_hf_ci": [0.1, 0.2]}

    usual = "\n".join(bench_lines(140))
    assert "the fastest plain arm: plain" in usual
    assert "fastest" not in usual.replace("the fastest plain arm", "")
    changed = bench_lines(160, faster)
    assert "the fastest plain arm: hf_generate" in "\n".join(changed)
    row = next(line for line in changed if line.startswith("lookup  "))
    assert row.count("0.12 [0.10, 0.20]") == 2
    arm = made_runs.bench()["arms"][-1]
    assert row.index("0.12 [") < row.index(f"{arm['speedup_vs_plain']:.2f} [")


def test_compiled_arms_beside_eager_baseline_are_red():
    content = made_runs.bench()
    for arm in content["arms"]:
        arm["compile_mode"] = "inductor"
    assert tables(BenchResults.read(content))[0].alarms == []
    content["arms"][1]["compile_mode"] = "eager"
    (table,) = tables(BenchResults.read(content))
    (alarm,) = table.alarms
    assert "stand beside an eager baseline (hf_generate)" in alarm
    console = Console(width=400, force_terminal=True, file=StringIO())
    console.print(table.fit(400))
    assert "\x1b[1;3;31mcompiled arms (plain" in console.file.getvalue()


def test_table_tells_waiting_threads_and_compilation():
    content = made_runs.bench()
    where = content["provenance"]
    where |= {"omp_wait_policy": "PASSIVE", "compile_mode": "inductor", "compiler": "g++ 12"}
    where |= {"compile_s": 41.4}
    text = "\n".join(bench_lines(200, lambda arms: None, where))
    assert "OMP_WAIT_POLICY is passive" in text
    assert "compiled (inductor, g++ 12); 41 s of compilation are in no timed call" in text
    for key, value in {"threads": 1, "device": "A GPU"}.items():
        assert "OMP" not in "\n".join(bench_lines(200, lambda arms: None, where | {key: value}))


def test_arms_without_figures_show_dashes():
    def forget(arms):
        for arm in arms:
            arm |= {"speedup_vs_plain": None, "speedup_vs_plain_ci": None, "per_depth": []}

    assert any(" - " in line for line in bench_lines(80, forget))


@pytest.fixture
def sweep(tmp_path):
    content = made_runs.sweep(tmp_path)
    plain, eagle3 = (deepcopy(content["cells"][0]["arms"][place]) for place in (0, 2))
    eagle3["name"] = "eagle3"
    figures = next(iter(eagle3["domains"].values())) | {"tau": 0.94, "speedup_vs_plain": 0.62}
    for arm in (plain, eagle3):
        arm["domains"] = {"sea": figures, "land": figures}
    only = {**plain, "domains": {"sea": figures}}
    settings = [(0.0, "/data/a.txt"), (0.5, "/data/b.txt"), (1.0, "/data/b.txt")]
    content["cells"] = [
        {
            **content["cells"][0],
            "settings": {"sampling.temperature": temperature, "prompts.source": source},
            "arms": arms,
        }
        for (temperature, source), arms in zip(settings, [[plain, eagle3], [only], []], strict=True)
    ]
    return sweep_table(SweepResults.read(content))


def test_sweep_names_settings_once_and_keeps_failed_cells(sweep):
    rows = [line.split()[:3] for line in lines(sweep, 140)]
    for row in (["0", "a.txt", "plain"], ["0.5", "b.txt", "plain"], ["1", "b.txt", "failed"]):
        assert row in rows
    assert any(row[0] == "eagle3" for row in rows if row)


@pytest.mark.parametrize(
    ("width", "num_intervals", "num_parts"), [(140, 3, 1), (90, 1, 1), (80, 0, 1), (56, 0, 2)]
)
def test_sweep_gives_up_intervals_then_is_split(sweep, width, num_intervals, num_parts):
    text = lines(sweep, width)
    rows = [line for line in text if line.strip().startswith("eagle3")]
    assert sum(row.count("[") for row in rows) == num_intervals
    assert len(rows) == num_parts
    assert any("sea" in line for line in text)
    assert any("0.94  0.62" in row for row in rows)
    # A domain that a cell does not have is a dash.
    assert [line for line in text if line.startswith("0.5")][-1].endswith(" -")


@pytest.mark.parametrize("name", SUITES)
def test_suite_tables_hold_every_group_once(name):
    found = SuiteResults.read(made_runs.suite(name))
    first, waiting = ("\n".join(lines(table, 200)) for table in tables(found))
    for group in found.groups:
        assert first.count(group.name) == waiting.count(group.name) == 1
    assert "power: not measured" in first
    assert "J/token" not in first
    assert "chunk gap" in waiting.replace("\n", " ")
    assert ("queue" in waiting) == (name == "concurrent")


def test_suite_tables_show_figures_of_results():
    content = made_runs.suite()
    arm = content["groups"][1]["arms"][2]
    arm["load"] |= {"tokens_per_s": 1234.0, "jain_index": 0.875}
    arm["load"] |= {"user_speed_vs_plain": 1.75, "user_speed_vs_plain_ci": [1.5, 2.0]}
    arm["memory"] |= {"cache_bytes": 77 * 2**20, "peak_device_bytes": 88 * 2**20}
    arm["power"] = {"energy_j": 5.0, "power_w": 60.0, "energy_j_per_token": 0.125}
    arm["ttft_s"] = {"p50": 0.0111, "p95": 0.0222, "p99": 0.0333}
    first, waiting = tables(SuiteResults.read(content))
    text = lines(first, 160)
    line = next(line for line in text if "1234" in line)
    for figure in (arm["name"], "1.75 [1.50, 2.00]", "0.875", "77", "88", "0.125"):
        assert figure in line
    assert "power: not measured" not in "\n".join(text)
    assert any("11.1    22.2    33.3" in line for line in lines(waiting, 160))


def test_table_gives_values_and_intervals_as_data():
    columns = [Column("a", "a", 1), Column("b.c", "b\nc", 0, scale=1000), Column("d", "d")]
    table = Table("t", "c", [{"a": 0.123, "a_ci": (0.1, 0.2), "b": {"c": 0.5}}], columns)
    assert table.cells() == [["0.1 [0.1, 0.2]", "500", "-"]]
    titles = {"a": "a", "b.c": "b c", "d": "d"}
    assert table.model_dump(mode="json") == {
        "id": "t",
        "caption": "c",
        "columns": [{"key": key, "title": title} for key, title in titles.items()],
        "rows": [{"a": 0.123, "a_ci": [0.1, 0.2], "b.c": 0.5, "d": None}],
        "alarms": [],
    }


def every_table(folder):
    """The tables of all commands, from committed results."""
    makers = {
        **{"bench": [tables], "suite": [tables], "sweep": [sweep_table]},
        **{"plan": [costs_table, schedule_table, plan_table], "estimate": [estimate_table]},
    }
    for run in read_runs(made_runs.every_kind(folder))[0]:
        for make in makers.get(run.kind, ()):
            found = make(run.data)
            yield from found if isinstance(found, list) else [found]
    yield analysis_table(Analysis.read(made_runs.analysis()))
    counts = {name: Drop(count=3) for name in REASONS}
    given = {"domains": {"bank": [("train", 90), ("held out", 10)]}, "dropped": counts}
    yield _table(SimpleNamespace(**given, masked={"email": 4}))


@pytest.fixture(scope="module")
def in_terminals(tmp_path_factory):
    """Lines of a process whose terminal takes one width after the other."""
    script = f"""
import struct, sys, termios
from fcntl import ioctl
from pathlib import Path
from specdec.report.tables import print_tables
from test_tables import every_table

shown = list(every_table(Path(sys.argv[1])))
for width in {WIDTHS}:
    ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    print_tables(*shown)
    print("END")
"""
    places = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": places, "TERM": "dumb", "NO_COLOR": "1"}
    environment = {k: v for k, v in environment.items() if k not in ("COLUMNS", "LINES")}
    master, slave = pty.openpty()
    command = [sys.executable, "-c", script, str(tmp_path_factory.mktemp("tables"))]
    with subprocess.Popen(command, stdout=slave, env=environment) as process:
        os.close(slave)
        shown = b""
        while part := _read(master):
            shown += part
    assert process.returncode == 0
    found = shown.decode().replace("\r\n", "\n").split("END\n")
    lines = ([line.rstrip() for line in part.splitlines()] for part in found)
    return {
        width: "".join(f"{line}\n" for line in part)
        for width, part in zip(WIDTHS, lines, strict=False)
    }


def _read(terminal):
    try:
        return os.read(terminal, 2**16)
    except OSError:  # its process has ended
        return b""


@pytest.mark.parametrize("width", WIDTHS)
def test_every_table_in_a_terminal(in_terminals, width):
    """SPECDEC_SNAPSHOTS=write in the environment writes the files anew; look at them then."""
    shown, file = in_terminals[width], SNAPSHOTS / f"tables-{width}.txt"
    if os.environ.get("SPECDEC_SNAPSHOTS") == "write":
        file.parent.mkdir(exist_ok=True)
        file.write_text(shown)
    assert max(map(len, shown.splitlines())) <= width
    assert shown == file.read_text()
