"""A page in a headless Chromium, without a network: it typesets formulas with MathJax, and prints."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from course.site.pages import mathjax
from helpers.errors import CourseError

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium() -> str:
    """Path of the browser; CourseError where there is none."""
    if (path := next(filter(None, map(shutil.which, NAMES)), None)) is None:
        raise CourseError("EPUB and PDF need Chromium for their formulas: install it, as in apt-get install chromium.")
    return path


@contextmanager
def page_with_mathjax(address: str = "about:blank") -> Iterator[Any]:
    """Yield playwright's page, with MathJax loaded into what is at the address; CourseError without a browser."""
    from playwright.sync_api import sync_playwright

    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        page = browser.new_page(offline=True)
        page.set_default_timeout(0)  # a busy machine takes its time
        page.goto(address)
        page.evaluate("() => { window.MathJax = {startup: {typeset: false}, options: {enableMenu: false}} }")
        if address == "about:blank":  # may load nothing from a file
            page.add_script_tag(path=mathjax() / "tex-chtml.js")
        else:  # finds its fonts by its address
            page.add_script_tag(url=(mathjax() / "tex-chtml.js").as_uri())
        page.evaluate("() => MathJax.startup.promise")
        yield page
        browser.close()
