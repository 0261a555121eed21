"""A headless browser that tells what went wrong in its pages."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LOOPBACK = {"localhost", "127.0.0.1", "::1"}
NOWHERE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1"


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.ui)


@pytest.fixture(scope="session")
def browser():
    """Chromium: the system's, else Playwright's own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with playwright.sync_playwright() as driver:
        found = next(filter(None, map(shutil.which, CHROMIUM)), driver.chromium.executable_path)
        if not Path(found).exists():
            pytest.skip(f"no browser: none of {', '.join(CHROMIUM)} on the path, and none of Playwright's own")
        sandboxed = [] if getattr(os, "geteuid", lambda: 1)() else ["--no-sandbox"]  # which root may not have
        started = driver.chromium.launch(executable_path=found, args=[*sandboxed, NOWHERE])
        yield started
        started.close()


@pytest.fixture
def problems():
    """What went wrong in ``page`` so far: console errors, uncaught exceptions, requests that left this machine."""
    return []


@pytest.fixture
def page(browser, problems):
    """An empty page, 1280 × 900; its problems are in ``problems``."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.on("console", lambda message: problems.append(f"console: {message.text}") if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(f"exception: {error}"))
    page.on("request", lambda request: _note_request(request.url, problems))
    yield page
    context.close()


def _note_request(url, problems):
    address = urlsplit(url)
    if address.scheme in ("http", "https", "ws", "wss") and address.hostname not in LOOPBACK:
        problems.append(f"request: {url}")
