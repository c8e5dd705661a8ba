"""A headless Chromium, and what it sees of a page."""

import contextlib
import json
import shutil

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="no Chromium with its driver on this machine: apt-get install chromium chromium-driver",
)
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900")


@contextlib.contextmanager
def browser(downloads):
    """A driver that notes all messages and requests, and downloads into a folder."""
    webdriver = pytest.importorskip("selenium.webdriver")
    service = pytest.importorskip("selenium.webdriver.chrome.service")
    options = webdriver.ChromeOptions()
    for option in OPTIONS:
        options.add_argument(option)
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    driver = webdriver.Chrome(options=options, service=service.Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def show(driver, width, scheme="light"):
    """The screen so wide, in light or dark."""
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def requests(driver):
    """Every address that the page has asked for so far."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def stops(driver):
    """Role and name of everything that the keyboard reaches, as a screen reader is told."""
    nodes = driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    for node in nodes:
        properties = {p["name"]: p["value"].get("value") for p in node.get("properties", [])}
        if properties.get("focusable") and node["role"]["value"] != "RootWebArea":
            yield node["role"]["value"], node.get("name", {}).get("value", "")


CUT = """
const width = document.documentElement.clientWidth, scrolls = (e) => getComputedStyle(e).overflowX === 'auto';
const inside = (e) => { for (let p = e.parentElement; p; p = p.parentElement) if (scrolls(p)) return true; return false; };
const cut = [...document.querySelectorAll('body *')].filter((e) => {
  const box = e.getBoundingClientRect();
  return box.width > 0 && box.right > width + 1 && !inside(e);
});
const stuck = [...document.querySelectorAll('.table, .picture')].filter((e) =>
  e.scrollWidth > e.clientWidth + 1 && !(e.tabIndex === 0 && e.getAttribute('aria-label')));
return [document.documentElement.scrollWidth - width, [...cut, ...stuck].map((e) => e.outerHTML.slice(0, 120))];
"""


def cut(driver):
    """Pixels by which the page is wider than the screen, and elements that are cut or cannot be scrolled to."""
    return driver.execute_script(CUT)
