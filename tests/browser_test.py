"""The page in a real browser; skipped where there is none.

Chromium and its driver come from the system (`apt-get install chromium
chromium-driver`), selenium from requirements-dev.txt.
"""

import base64
import contextlib
import html
import json
import shutil
import tempfile
import time
import unittest
from typing import Any

from absl.testing import absltest, parameterized

from dfq_tf.reports import page, record
from tests import pages
from tests.helpers import new_folder

try:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
except ImportError:  # the tests say so
    webdriver = None

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# Contrast of each text with what is behind it (WCAG 2.2, 1.4.3), and other rules that
# axe has too. Returns the texts that break one.
_RULES = """
const bad = [];
const channels = (c) => c.match(/[\\d.]+/g).map(Number);
const luminance = ([r, g, b]) => {
  const l = [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92
                                             : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * l[0] + 0.7152 * l[1] + 0.0722 * l[2];
};
const behind = (e) => {
  for (; e; e = e.parentElement) {
    const c = channels(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] > 0) return c;
  }
  return [255, 255, 255];
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let count = 0;
while (walker.nextNode()) {
  const node = walker.currentNode, e = node.parentElement;
  if (!node.data.trim() || ["SCRIPT", "STYLE", "title"].includes(e.tagName)) continue;
  if (!e.checkVisibility() || e.closest(".skip")) continue;
  const style = getComputedStyle(e), isSvg = e.namespaceURI.endsWith("svg");
  const [a, b] = [channels(isSvg ? style.fill : style.color), behind(e)].map(luminance);
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  count += 1;
  if (ratio < 4.5) bad.push(`contrast ${ratio.toFixed(2)}: ${node.data.trim()}`);
}
for (const e of document.querySelectorAll("img:not([alt]), svg:not([aria-label])"
    + ":not([aria-hidden])")) bad.push(`no text instead: ${e.outerHTML.slice(0, 80)}`);
let last = 0;
for (const e of document.querySelectorAll("h1, h2, h3")) {
  const level = Number(e.tagName[1]);
  if (level > last + 1) bad.push(`heading skips a level: ${e.textContent}`);
  last = level;
}
const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
if (new Set(ids).size < ids.length) bad.push("an id is there twice");
return [count, bad];
"""


def _reason() -> str:
    if webdriver is None:
        return "selenium is not installed (requirements-dev.txt)"
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            return f"there is no {program} on this machine"
    return ""


@contextlib.contextmanager
def browser(width: int, dark: bool, scripts: bool = True):
    """Chromium, with its window as wide as that."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in _FLAGS:
        options.add_argument(flag)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options.add_argument(f"--user-data-dir={profile}")
        options.set_capability(
            "goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"}
        )
        driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
        try:
            _emulate(driver, width, dark, scripts)
            yield driver
        finally:
            driver.quit()


def _emulate(driver: Any, width: int, dark: bool, scripts: bool = True) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1}
    size["mobile"] = width < 500
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    driver.execute_cdp_cmd(
        "Emulation.setScriptExecutionDisabled", {"value": not scripts}
    )


def picture(driver: Any, height: int | None = None) -> bytes:
    """A PNG of the page, all of it or as much from its top."""
    size = driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": size["width"], "scale": 1}
    clip["height"] = height or size["height"]
    shot = driver.execute_cdp_cmd(
        "Page.captureScreenshot",
        {"format": "png", "captureBeyondViewport": True, "clip": clip},
    )
    return base64.b64decode(shot["data"])


def _column(driver: Any, table: str, column: int) -> list[str]:
    return driver.execute_script(
        "return [...document.querySelector(arguments[0]).tBodies[0].rows]"
        ".map((row) => row.cells[arguments[1]].textContent.trim())",
        table,
        column,
    )


@unittest.skipIf(_reason(), _reason())
class BrowserTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = pages.write(new_folder() / "run")
        cls.urls = [page.write(cls.folder).as_uri()]
        runs = [record.read(cls.folder), record.read(pages.write(new_folder() / "two"))]
        path = cls.folder / "comparison.html"
        path.write_text(page.comparison(runs))
        cls.urls.append(path.as_uri())
        cls.driver = cls.enterClassContext(browser(1400, False))

    def open(self, url, width=1400, dark=False):
        _emulate(self.driver, width, dark)
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)  # of the page before
        self.driver.get(url)

    @parameterized.product(which=(0, 1), width=(390, 1400), dark=(False, True))
    def test_is_readable_and_asks_for_nothing(self, which, width, dark):
        self.open(self.urls[which], width, dark)
        time.sleep(0.2)
        self.assertEqual(self.driver.get_log("browser"), [])
        events = [
            json.loads(entry["message"])["message"]
            for entry in self.driver.get_log("performance")
        ]
        asked = [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]
        asked = [url for url in asked if not url.startswith("data:")]
        self.assertEqual(asked, [self.urls[which]])
        count, bad = self.driver.execute_script(_RULES)
        self.assertGreater(count, 40)
        self.assertEqual(bad, [])
        # Nothing is wider than the screen.
        wide = self.driver.execute_script("return document.body.scrollWidth")
        self.assertLessEqual(wide, width)
        self.assertStartsWith(picture(self.driver), b"\x89PNG")

    @parameterized.parameters(390, 761, 800, 961, 1400)
    def test_models_and_figures_fill_the_page_and_no_more(self, width):
        self.open(self.urls[0], width)
        hidden, empty, narrowest = self.driver.execute_script(
            "const table = document.querySelector('.scroll.models');"
            "const box = (e) => document.querySelector(e).getBoundingClientRect();"
            "const names = [...document.querySelectorAll('.layers tbody th')];"
            "return [table.scrollWidth - table.clientWidth,"
            " box('.tiles').right - box('.tiles div:last-child').right,"
            " Math.min(...names.map((each) => each.offsetWidth))]"
        )
        self.assertEqual(hidden, 0)
        self.assertLessEqual(empty, 1)  # the border
        self.assertGreaterEqual(narrowest, 60 if width > 760 else 140)

    def test_table_sorts_by_numbers_and_by_names(self):
        self.open(self.urls[0])
        table, alone = "#layers table", 5
        press = (
            "document.querySelectorAll('#layers thead button')[arguments[0]].click()"
        )
        self.driver.execute_script(press, alone)
        self.assertEqual(
            _column(self.driver, table, alone), ["12.3", "31.2", "40.5", ""]
        )
        self.driver.execute_script(press, alone)
        self.assertEqual(
            _column(self.driver, table, alone), ["40.5", "31.2", "12.3", ""]
        )
        heads = self.driver.execute_script(
            "return [...document.querySelectorAll('#layers th[aria-sort]')]"
            ".map((each) => each.ariaSort)"
        )
        self.assertEqual(heads, ["descending"])
        self.driver.execute_script(press, 0)
        names = _column(self.driver, table, 0)
        self.assertEqual(names, sorted(names))

    def test_names_are_text(self):
        self.open(self.urls[0])
        text = self.driver.execute_script("return document.body.innerText")
        for name in pages.NAMES:
            self.assertIn(name, text)
        scripts = "return document.scripts.length"
        self.assertEqual(self.driver.execute_script(scripts), 1)

    def test_can_be_read_without_scripts(self):
        with browser(1400, False, scripts=False) as driver:
            driver.get(self.urls[0])
            tree = driver.execute_cdp_cmd("DOM.getDocument", {"depth": 1})
            root = {"nodeId": tree["root"]["nodeId"]}
            found = driver.execute_cdp_cmd("DOM.getOuterHTML", root)["outerHTML"]
        self.assertNotIn("<button", found)  # those come by script
        self.assertIn("<details open", found)
        for layer in pages.LAYERS:
            self.assertIn(html.escape(layer["name"]), found)


if __name__ == "__main__":
    absltest.main()
