"""The page in a real browser: complete, self-contained, and as wide as the screen."""

import json
import os
import shutil

import made_runs
import pytest

from specdec.report.document import escape
from specdec.report.page import write_report
from specdec.report.tables import words

pytest.importorskip("matplotlib")
SECTIONS = {
    "summary": "Summary",
    "log": "Runs over time",
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
    "training": "Training",
    "hardest": "Hardest contexts",
    "suite": "Suites",
    "estimate": "Estimate for other hardware",
    "runs": "Runs and settings",
    "definitions": "Definitions",
}
# Set where the browser has to be there: then its absence fails the tests that need it.
REQUIRED = "SPECDEC_REQUIRE_CHROMIUM"
FLAGS = (
    *("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run"),
    *("disable-background-networking", "disable-component-update", "disable-sync"),
    *("hide-scrollbars", "host-resolver-rules=MAP * ~NOTFOUND"),  # no network can be reached
)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(made_runs.every_kind(folder / "runs"), folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """A driver with a fresh profile; skips the test, or fails it where the browser is required."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    try:
        from selenium import webdriver
    except ImportError:
        webdriver = None
    if webdriver is None or None in programs:
        (pytest.fail if os.environ.get(REQUIRED) else pytest.skip)(
            "no browser: apt-get install chromium chromium-driver; pip install 'specdec-lab[dev]'"
        )
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(programs[1]))
    yield found
    found.quit()


@pytest.fixture
def show(driver, out):
    """Opens the page in a window of a width; gives the addresses that went to the network."""

    def show(width=1280, *, dark=False, media="screen", page="index.html"):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [scheme]})
        driver.get("about:blank")
        driver.get_log("performance")  # of whatever was open before
        driver.get((out / page).resolve().as_uri())
        sent = [json.loads(row["message"])["message"] for row in driver.get_log("performance")]
        asked = [m["params"] for m in sent if m["method"] == "Network.requestWillBeSent"]
        failed = [m["params"] for m in sent if m["method"] == "Network.loadingFailed"]
        never = [each["requestId"] for each in failed if each.get("blockedReason") == "csp"]
        return [each["request"]["url"] for each in asked if each["requestId"] not in never]

    return show


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_page_is_whole_offline_and_fits_the_screen(driver, out, show, width):
    asked = [url for url in show(width) if not url.startswith("data:")]
    assert asked == [(out / "index.html").resolve().as_uri()]
    sizes = driver.execute_script(
        "return [...document.images].map(i => [i.naturalWidth, i.clientWidth, i.alt.length])"
    )
    figures = json.loads((out / "report.json").read_text())["sections"]
    assert len(sizes) == sum(len(section["figures"]) for section in figures) > 10
    assert all(natural > 0 and 0 < shown <= width and alt > 20 for natural, shown, alt in sizes)
    page = driver.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
    assert page == [width, width]


@pytest.mark.slow
def test_paper_cuts_off_no_table(driver, show):
    width = 718  # A4 with the usual margins
    show(width, media="print")
    ends = driver.execute_script(
        "return [...document.querySelectorAll('table, img')]"
        ".map(e => [e.id || e.alt, e.getBoundingClientRect().right])"
    )
    assert [name for name, end in ends if end > width] == []


@pytest.mark.slow
def test_sections_arms_and_links_are_complete(driver, show):
    show()
    headings = driver.execute_script(
        "return [...document.querySelectorAll('section')]"
        ".map(s => [s.id, s.querySelector('h2').textContent])"
    )
    assert dict(headings) == SECTIONS
    text = driver.execute_script("return document.body.innerText")
    assert all(name in text for name in made_runs.ARMS.values())
    targets = driver.execute_script(
        "return [...document.links].map(a => [a.getAttribute('href'), "
        "!!document.getElementById(a.hash.slice(1))])"
    )
    assert all(href.startswith("#") and found for href, found in targets)
    assert len([href for href, _ in targets if href.startswith("#def-")]) > 10


@pytest.mark.slow
def test_page_shows_figures_of_the_data(driver, out, show):
    show()
    cells = driver.execute_script(
        "return [...document.querySelectorAll('#table-arms-1 tbody tr')]"
        ".map(r => [...r.cells].map(c => c.textContent))"
    )
    arms = json.loads((out.parent / "runs" / "bench" / "results.json").read_text())["arms"]
    for row, arm in zip(cells, arms, strict=True):
        assert row[0] == arm["name"]
        tau, speed = arm["tau"], arm["speedup_vs_plain"]
        low, high = arm["speedup_vs_plain_ci"]
        # An interval of one point says nothing.
        assert row[1].startswith("-" if tau is None else f"{tau:.2f}")
        assert row[4] == f"{speed:.2f}" + (f" [{low:.2f}, {high:.2f}]" if low < high else "")


@pytest.mark.slow
def test_text_of_runs_is_never_markup(driver, show):
    show()
    context = driver.execute_script("return document.querySelector('blockquote').textContent")
    place = made_runs.HARDEST
    assert context == f"… {place['before']}{place['drafted'][0]} {place['target']}"
    assert not driver.execute_script("return document.querySelector('td b, main :is(i, script)')")
    styles = driver.execute_script(
        "return ['del', 'mark'].map(n => "
        "getComputedStyle(document.querySelector(n)).textDecorationLine)"
    )
    assert styles == ["line-through", "underline"]  # told apart without colour too


def texts_of(driver, selector):
    return driver.execute_script(
        f"return [...document.querySelectorAll('{selector}')].map(c => c.textContent)"
    )


@pytest.mark.slow
def test_scripts_that_are_not_the_page_s_never_run(driver, out, show):
    show()
    title = driver.title
    assert title.startswith("Speculative decoding")
    # Even where escaping failed, nothing runs and nothing is loaded.
    text = (out / "index.html").read_text()
    bad = (
        "<script>document.title = 'run'</script><img src='x' onerror=\"document.title = 'run'\">"
        "<img src='https://example.org/a.png'><script src='https://example.org/a.js'></script>"
    )
    (out / "bad.html").write_text(text.replace("<main>", f"<main>{bad}"))
    asked = [url for url in show(page="bad.html") if not url.startswith("data:")]
    (out / "bad.html").unlink()
    assert driver.title == title
    assert [url.rpartition("/")[2] for url in asked] == ["bad.html"]
    assert driver.execute_script("return document.querySelectorAll('input').length") > 0


@pytest.mark.slow
def test_heading_sorts_its_column_by_number_or_text(driver, show):
    show()
    table = "#table-arms-1"
    before = texts_of(driver, f"{table} td:first-child")
    speeds = f"{table} td:nth-child(4)"
    heading = driver.find_element("css selector", f"{table} th:nth-child(4)")
    assert heading.text.startswith("tokens/s")
    for descending in (True, False):
        heading.click()
        found = [float(text.split()[0]) for text in texts_of(driver, speeds)]
        assert found == sorted(found, reverse=descending)
    driver.find_element("css selector", f"{table} th").click()
    assert texts_of(driver, f"{table} td:first-child") == sorted(before)
    # A link to a definition leaves the order as it is.
    driver.find_element("css selector", f"{table} th:nth-child(4) a").click()
    assert driver.current_url.endswith("#def-speed")
    assert texts_of(driver, f"{table} td:first-child") == sorted(before)


@pytest.mark.slow
def test_long_tables_are_folded_and_filtered(driver, out, show):
    show()
    tables = [
        t for s in json.loads((out / "report.json").read_text())["sections"] for t in s["tables"]
    ]
    folded = [f"table-{table['id']}" for table in tables if len(table["rows"]) > 12]
    found = "return [...document.querySelectorAll('details table')].map(t => t.id)"
    assert driver.execute_script(found) == folded != []
    assert "<input" not in (out / "index.html").read_text()  # it would do nothing without scripts
    box = driver.find_element("css selector", "details:has(#table-sweep-1) input")
    assert not box.is_displayed()
    driver.find_element("css selector", "details:has(#table-sweep-1) summary").click()
    box.send_keys("HF_gen")
    shown = texts_of(driver, "#table-sweep-1 tbody tr:not([hidden]) td:nth-child(2)")
    assert shown == ["hf_generate", "hf_generate"]


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


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_text_contrasts_in_light_and_dark(driver, show, dark):
    show(dark=dark)
    page, *contrasts = driver.execute_script(CONTRAST)
    assert page < 0.1 if dark else page > 0.9
    assert min(contrasts) >= 4.5, contrasts


def test_data_and_markdown_name_all_files(out):
    data = json.loads((out / "report.json").read_text())
    assert data["schema"] == "specdec-report-1"
    assert {section["id"] for section in data["sections"]} == set(SECTIONS) - {"definitions"}
    files = {figure["file"] for section in data["sections"] for figure in section["figures"]}
    assert files == {path.name for path in out.glob("*.png")}
    assert all((out / name).stat().st_size > 5000 for name in files)


def test_markdown_has_cells_and_pictures_of_the_data(out):
    text = (out / "report.md").read_text()
    for section in json.loads((out / "report.json").read_text())["sections"]:
        assert f"## {section['title']}" in text
        assert all(f"]({figure['file']})" in text for figure in section["figures"])
        for table in section["tables"]:
            rows = text.split(f"**{escape(table['caption'])}**")[1].split("\n\n")[1].splitlines()
            assert len(rows) == 2 + len(table["rows"])
            bars = {line.replace("\\|", "").count("|") for line in rows}
            assert bars == {1 + len(table["columns"])}
    assert "<b>" not in text
    assert r"&lt;/p>\_wrong\_" in text
    assert all(f'id="def-{term}"' in text for term in words()["terms"])
