"""The report in a real browser: headless Chromium, driven by Selenium, from a file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.report_run import make_run, write
from train.report.page import write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is in the extra [dev]")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="Chromium is not installed; `make browser-tools` does it on Debian",
)

OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
PICTURES = """
return Promise.all([...document.images].map(i => i.decode())).then(
    () => [...document.images].map(i => [i.alt, i.naturalWidth, i.clientWidth, i.clientHeight]))
"""
WIDTHS = "return [document.documentElement.scrollWidth, window.innerWidth]"
TABLES = """
return [...document.querySelectorAll('.table')].map(table => {
    const hint = table.previousElementSibling;
    return [
        table.innerText.slice(0, 40),
        table.scrollWidth > table.clientWidth,
        hint !== null && hint.matches('.scrolls') && hint.offsetHeight > 0,
    ];
})
"""
BACKGROUND = "return getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run with all kinds of pictures, and two runs compared."""
    folder = tmp_path_factory.mktemp("report")
    one, two = make_run(folder / "one"), make_run(folder / "two", steps=20)
    maps = [[None, 0.5, 0.2], [0.5, None, 0.3], [0.2, 0.3, None]]
    candidates = [{"leader": 0, "followers": [1], "loss_rise": 0.1}]
    isotropy = {"maps": maps, "without_sink": maps}
    write(one / "spans.json", {"candidates": candidates, "isotropy": isotropy})
    passages = [{"prompt": "def main", "text": "():\n    pass"}]
    write(
        one / "samples.json",
        {"passages": passages, "models": {"base": ["(x) " * 20], "post": ["\n#" * 30]}},
    )
    return {
        "run": write_report([one]),
        "runs": write_report([one, two], folder / "report.html"),
    }


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in OPTIONS:
        options.add_argument(option)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def show(browser: Any, page: Path, width: int, scheme: str = "light") -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(page.as_uri())


def open_folds(browser: Any) -> None:
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")


def requests(browser: Any) -> list[str]:
    """What the page asked for since the last call, but for what it carries itself."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in urls if not url.startswith("data:")]


@pytest.mark.parametrize(("name", "pictures"), [("run", 10), ("runs", 5)])
def test_it_opens_offline_without_an_error_and_with_all_pictures(
    browser: Any, pages: dict[str, Path], name: str, pictures: int
) -> None:
    requests(browser)
    browser.get_log("browser")
    show(browser, pages[name], 1280)
    open_folds(browser)
    shown = browser.execute_script(PICTURES)
    assert len(shown) == pictures
    for alt, natural, width, height in shown:
        assert alt
        assert natural > 0, alt
        assert width > 200, alt
        assert height > 150, alt
    assert requests(browser) == [pages[name].as_uri()]
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("name", ["run", "runs"])
def test_a_phone_scrolls_in_one_direction(browser: Any, pages: dict[str, Path], name: str) -> None:
    show(browser, pages[name], 390)
    open_folds(browser)
    content, window = browser.execute_script(WIDTHS)
    assert window == 390
    assert content <= window
    for _, _, width, _ in browser.execute_script(PICTURES):
        assert 280 < width <= 390, "a picture takes the width of the phone"


@pytest.mark.parametrize("name", ["run", "runs"])
def test_a_table_that_is_cut_says_so(browser: Any, pages: dict[str, Path], name: str) -> None:
    show(browser, pages[name], 390)
    open_folds(browser)
    found = browser.execute_script(TABLES)
    assert any(cut for _, cut, _ in found)
    for title, cut, hint in found:
        assert hint or not cut, title
    show(browser, pages[name], 1280)
    open_folds(browser)
    for title, _, hint in browser.execute_script(TABLES):
        assert not hint, f"{title}: a desk shows all columns"


def test_the_verdict_comes_first_and_engineering_last(browser: Any, pages: dict[str, Path]) -> None:
    show(browser, pages["run"], 390)
    place = "return document.querySelector('%s').getBoundingClientRect().top"
    assert browser.execute_script(place % ".chip") < 250
    assert browser.find_element("css selector", ".chip").text == "not worth it"
    fold = browser.find_element("css selector", ".engineering")
    assert "Versions" not in fold.text, "it is closed"
    for heading in browser.find_elements("css selector", "h2"):
        assert heading.rect["y"] < fold.rect["y"]


def test_dark_and_light(browser: Any, pages: dict[str, Path]) -> None:
    brightness = {}
    for scheme in ("light", "dark"):
        show(browser, pages["run"], 1200, scheme)
        red, green, blue = map(
            int,
            browser.execute_script(BACKGROUND).removeprefix("rgb(").removesuffix(")").split(","),
        )
        brightness[scheme] = max(red, green, blue), min(red, green, blue)
    assert brightness["light"][1] > 220
    assert brightness["dark"][0] < 50
