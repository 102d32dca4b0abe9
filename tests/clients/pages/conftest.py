"""Share a browser and two servers among the tests of the pages; no page may complain, or ask anyone else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from tests.clients.conftest import Server
from tests.clients.pages.chromium import EXPECTED, launched, listen, served


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


@pytest.fixture(scope="session")
def site(cappy: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve cappy-mini without a key."""
    with served(cappy, tmp_path_factory.mktemp("site") / "log") as address:
        yield address


@pytest.fixture(scope="session")
def site_with_key(server: Server) -> str:
    return f"{server.url}/"


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open an address in a window of its own; afterwards, nothing was complained of and only the server was asked."""
    opened: list[tuple[Page, str, list[str], list[str]]] = []

    def open_one(address: str, path: str = "", *, before: Callable[[Page], None] | None = None, **looks: Any) -> Page:
        page = browser.new_context(**looks).new_page()
        page.set_default_timeout(10_000)
        opened.append((page, address, *listen(page)))
        if before:
            before(page)
        page.goto(f"{address}{path}")
        return page

    yield open_one
    for page, address, complaints, addresses in opened:
        page.context.close()
        assert [said for said in complaints if not EXPECTED.match(said)] == []
        assert [asked for asked in addresses if not asked.startswith((address, "data:"))] == []
