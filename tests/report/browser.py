"""A real browser without a window, which cannot reach any network."""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

# Set where the browser has to be there: then its absence fails the tests that need it.
REQUIRED = "SPECDEC_REQUIRE_CHROMIUM"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


def missing():
    """Why there is no browser; empty if there is one."""
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        return (
            "chromium or chromedriver is not installed (apt-get install chromium chromium-driver)"
        )
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed (pip install 'specdec[dev]')"
    return ""


@contextmanager
def open_browser(profile):
    """A driver with a fresh profile; skips the test, or fails it where the browser is required."""
    why = missing()
    if why:
        (pytest.fail if os.environ.get(REQUIRED) else pytest.skip)(why)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def show(driver, path, width, *, dark=False, media="screen"):
    """Open a file in a window of this width; returns the addresses that it asked for."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [scheme]})
    driver.get("about:blank")
    driver.get_log("performance")  # of whatever was open before
    driver.get(Path(path).resolve().as_uri())
    messages = [json.loads(row["message"])["message"] for row in driver.get_log("performance")]
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
