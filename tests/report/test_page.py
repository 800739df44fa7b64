"""The page in a real browser: complete, self-contained, and as wide as the screen."""

import json
from pathlib import Path

import made_runs
import pytest
from browser import open_browser, show
from json_schema import violations

from specdec.report.document import DEFINITIONS, write_report

pytest.importorskip("matplotlib")
DOCS = Path(__file__).parents[2] / "docs"
SECTIONS = {
    "results": "Results",
    "domains": "By task",
    "speed": "Speed against tau",
    "acceptance": "Acceptance by depth",
    "shapes": "Draft shape against speed",
    "analysis": "Analysis without sampling noise",
    "calibration": "Calibration",
    "time": "Where the time went",
    "speedup": "Where the speedup went",
    "plan": "Plan",
    "prediction": "Prediction against measurement",
    "hardest": "Hardest contexts",
    "suite": "Suites",
    "estimate": "Estimate for other hardware",
    "runs": "Runs and settings",
    "definitions": "Definitions",
}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(made_runs.every_kind(folder / "runs"), folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.mark.parametrize("width", [1280, 400])
def test_every_picture_is_there_nothing_is_asked_for_and_nothing_sticks_out(driver, out, width):
    asked = show(driver, out / "index.html", width)
    assert [url for url in asked if not url.startswith("data:")] == [
        (out / "index.html").resolve().as_uri()
    ]
    sizes = driver.execute_script(
        "return [...document.images].map(i => [i.naturalWidth, i.clientWidth, i.alt.length])"
    )
    figures = json.loads((out / "report.json").read_text())["sections"]
    assert len(sizes) == sum(len(section["figures"]) for section in figures) > 10
    assert all(natural > 0 and 0 < shown <= width and alt > 20 for natural, shown, alt in sizes)
    page = driver.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
    assert page == [width, width]


def test_no_table_is_cut_off_on_paper(driver, out):
    width = 718  # A4 with the usual margins
    show(driver, out / "index.html", width, media="print")
    ends = driver.execute_script(
        "return [...document.querySelectorAll('table, img')]"
        ".map(e => [e.id || e.alt, e.getBoundingClientRect().right])"
    )
    assert [name for name, end in ends if end > width] == []


def test_all_sections_and_arms_are_there_and_every_link_leads_somewhere(driver, out):
    show(driver, out / "index.html", 1280)
    headings = driver.execute_script(
        "return [...document.querySelectorAll('section')]"
        ".map(s => [s.id, s.querySelector('h2').textContent])"
    )
    assert dict(headings) == SECTIONS
    text = driver.execute_script("return document.body.innerText")
    for name in made_runs.ARMS:
        assert name in text
    targets = driver.execute_script(
        "return [...document.links].map(a => [a.getAttribute('href'), "
        "!!document.getElementById(a.hash.slice(1))])"
    )
    assert all(href.startswith("#") and found for href, found in targets)
    assert len([href for href, _ in targets if href.startswith("#def-")]) > 10


def test_the_figures_in_the_page_are_those_of_the_data(driver, out):
    show(driver, out / "index.html", 1280)
    cells = driver.execute_script(
        "return [...document.querySelectorAll('#table-arms-1 tbody tr')]"
        ".map(r => [...r.cells].map(c => c.textContent))"
    )
    arms = json.loads((out.parent / "runs" / "bench" / "results.json").read_text())["arms"]
    assert len(cells) == len(arms)
    for row, arm in zip(cells, arms, strict=True):
        assert row[0] == arm["name"]
        tau, speed = arm["tau"], arm["speedup_vs_plain"]
        low, high = arm["speedup_vs_plain_ci"]
        assert row[1].startswith("-" if tau is None else f"{tau:.2f} [")
        assert row[3] == f"{speed:.2f}x [{low:.2f}, {high:.2f}]"


def test_text_of_the_runs_is_shown_and_never_taken_for_markup(driver, out):
    show(driver, out / "index.html", 1280)
    context = driver.execute_script("return document.querySelector('blockquote').textContent")
    place = made_runs.HARDEST
    assert context == f"… {place['before']}{place['drafted'][0]} {place['target']}"
    assert (
        driver.execute_script("return document.querySelectorAll('td b, blockquote i').length") == 0
    )
    styles = driver.execute_script(
        "return ['del', 'mark'].map(n => "
        "getComputedStyle(document.querySelector(n)).textDecorationLine)"
    )
    assert styles == ["line-through", "underline"]  # told apart without colour too


CONTRAST = """
const luminance = colour => {
  const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const page = luminance(getComputedStyle(document.body).backgroundColor);
return [page, ...['p', 'a', 'del', 'mark', 'td', '.note', 'figcaption'].map(selector => {
  const text = luminance(getComputedStyle(document.querySelector('main ' + selector)).color);
  return (Math.max(text, page) + 0.05) / (Math.min(text, page) + 0.05);
})];
"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_the_page_in_light_and_dark(driver, out, dark):
    show(driver, out / "index.html", 1280, dark=dark)
    page, *contrasts = driver.execute_script(CONTRAST)
    assert page < 0.1 if dark else page > 0.9
    assert min(contrasts) >= 4.5, contrasts


def test_the_data_follow_their_schema_and_match_the_files(out):
    schema = json.loads((DOCS / "report.schema.json").read_text())
    data = json.loads((out / "report.json").read_text())
    assert violations(data, schema) == []
    files = {figure["file"] for section in data["sections"] for figure in section["figures"]}
    assert files == {path.name for path in out.glob("*.png")}
    assert all((out / name).stat().st_size > 5000 for name in files)
    assert {section["id"] for section in data["sections"]} == set(SECTIONS) - {"definitions"}


def test_markdown_has_the_same_cells_and_pictures_as_the_data(out):
    text = (out / "report.md").read_text()
    data = json.loads((out / "report.json").read_text())
    for section in data["sections"]:
        assert f"## {section['title']}" in text
        for figure in section["figures"]:
            assert f"]({figure['file']})" in text
        for table in section["tables"]:
            head = text.split(f"**{table['caption']}**")[1].split("\n\n")[1].splitlines()
            assert len(head) == 2 + len(table["rows"])
            assert {line.replace("\\|", "").count("|") for line in head} == {
                1 + len(table["columns"])
            }
    assert "<b>" not in text
    assert r"&lt;/p>\_wrong\_" in text
    for term in DEFINITIONS:
        assert f'id="def-{term}"' in text
