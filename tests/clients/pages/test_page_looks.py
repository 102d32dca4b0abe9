"""How the pages look: bars as long as scores, light and dark, narrow, with any script; and axe finds nothing wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.clients.pages.test_page import answer, fill, rank, ranking, shown

Open = Callable[..., Page]

PHONE = {"viewport": {"width": 320, "height": 640}}


def ranked(open_page: Open, site: str, *scores: float, **looks: Any) -> Page:
    """Open the page with a ranking of these scores on it."""
    page = open_page(site, before=lambda page: page.route("**/v1/rank", answer(200, ranking(*scores))), **looks)
    rank(page, "\n".join(f"text {place}" for place in range(len(scores))))
    shown(page)
    return page


def boxes(page: Page, selector: str) -> list[tuple[float, float]]:
    """Give the left and right ends of elements, as parts of the first bar's width."""
    track = page.locator(".bar").first.bounding_box()
    found = [each.bounding_box() for each in page.locator(selector).all()]
    assert track
    assert all(found)
    return [
        ((box["x"] - track["x"]) / track["width"], (box["x"] + box["width"] - track["x"]) / track["width"])
        for box in found
        if box
    ]


@pytest.mark.parametrize(
    ("scores", "low", "high"),
    [
        ([0.97, 0.25, 0.0], 0, 1),
        ([0.02, 0.01], 0, 1),
        ([1.25, 0.5, -0.75], -0.75, 1.25),
        ([8.5, -0.1, -10.25], -10.25, 8.5),
        ([-2.0, -8.0], -8, 1),
        ([900.0, 850.5], 0, 900),
    ],
)
def test_a_bar_goes_from_zero_to_the_score(
    open_page: Open, site: str, scores: list[float], low: float, high: float
) -> None:
    page = ranked(open_page, site, *scores)
    for score, (left, right) in zip(scores, boxes(page, ".bar span"), strict=True):
        begin, end = sorted([0, score])
        assert left == pytest.approx((begin - low) / (high - low), abs=0.005)
        assert right == pytest.approx((end - low) / (high - low), abs=0.005)
    written = page.locator("#scale").inner_text().split()
    assert {written[0], written[-1]} == {f"{end:g}".replace("-", "\u2212") for end in (low, high)}
    assert all(-0.01 <= left < right <= 1.01 for left, right in boxes(page, "#scale span"))


def test_negative_scores_have_a_real_minus_and_great_ones_fewer_digits(open_page: Open, site: str) -> None:
    page = ranked(open_page, site, 1234.5678, 123.4567, -0.12345)
    assert [score for _, score in shown(page)] == ["1234.6", "123.46", "\u22120.1235"]


def test_dark_is_dark_and_light_is_light(open_page: Open, site: str) -> None:
    def light_of(scheme: str, path: str) -> tuple[int, int]:
        page = open_page(site, path, color_scheme=scheme)
        colours = page.evaluate(
            "(({backgroundColor, color}) => [backgroundColor, color])(getComputedStyle(document.body))"
        )
        paper, ink = (sum(map(int, colour.removeprefix("rgb(").rstrip(")").split(","))) for colour in colours)
        return paper, ink

    for path in ("", "docs"):
        paper, ink = light_of("light", path)
        assert paper > 700 > 150 > ink
        paper, ink = light_of("dark", path)
        assert ink > 600 > 120 > paper


@pytest.mark.parametrize("path", ["", "docs"])
def test_nothing_is_wider_than_a_phone(open_page: Open, site: str, path: str) -> None:
    page = open_page(site, path, **PHONE)
    if path:
        expect(page.locator("article").first).to_be_visible()
    else:
        rank(page, f"{'unbroken' * 200}\nshort\n{'word ' * 500}", instruction="x" * 3000)
        shown(page)
        page.get_by_text("Options").click()
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    ends = "[...document.querySelectorAll('main :not(pre)')].map((each) => each.getBoundingClientRect().right)"
    assert max(page.evaluate(ends)) <= 320
    texts = "[...document.querySelectorAll('main p, main dd, main h3')]"
    hidden = f"{texts}.map((each) => each.scrollWidth - each.clientWidth)"
    assert max(page.evaluate(hidden)) <= 0


def test_on_a_phone_the_answer_comes_into_view(open_page: Open, site: str) -> None:
    page = ranked(open_page, site, 0.9, 0.1, **PHONE, reduced_motion="reduce")
    expect(page.locator("#summary")).to_be_in_viewport()


def test_nothing_moves_for_who_wants_calm(open_page: Open, site: str) -> None:
    page = open_page(site, reduced_motion="reduce")
    durations = "[...document.querySelectorAll('*')].map((e) => getComputedStyle(e).transitionDuration)"
    assert set(page.evaluate(durations)) == {"0s"}
    assert page.evaluate("document.getAnimations().length") == 0


def test_each_text_has_its_own_direction(open_page: Open, site: str) -> None:
    page = open_page(site)
    texts = ["الأعمال والاقتصاد", "经济与商业", "Business", "עסקים"]
    rank(page, "\n".join(texts))
    shown(page)
    for text, direction in zip(texts, ["rtl", "ltr", "ltr", "rtl"], strict=True):
        expect(page.locator("#ranking .text", has_text=text)).to_have_css("direction", direction)


def test_a_long_text_is_cut_off_until_all_of_it_is_asked_for(open_page: Open, site: str) -> None:
    page = open_page(site)
    rank(page, f"short\n{'word ' * 2000}")
    shown(page)
    text = page.locator("#ranking .text", has_text="word word")
    button = page.get_by_role("button", name="Show all")
    assert button.count() == 1
    before = text.bounding_box()
    button.focus()
    page.keyboard.press("Enter")
    after = text.bounding_box()
    assert before
    assert after
    assert before["height"] < 150 < 1000 < after["height"]
    expect(page.get_by_role("button", name="Show less")).to_have_attribute("aria-expanded", "true")


def test_200_candidates_are_all_there(open_page: Open, site: str) -> None:
    page = open_page(site)
    fill(page, "\n".join(f"Answer {number}" for number in range(200)))
    expect(page.locator("#count")).to_have_text("200 candidates")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#summary")).to_contain_text("200 candidates ranked.")
    texts = page.locator("#ranking .text").all_inner_texts()
    assert sorted(texts) == sorted(f"Answer {number}" for number in range(200))
    written = page.locator("#ranking .score").all_text_contents()
    scores = [float(score.removeprefix("Score ").replace("\u2212", "-")) for score in written]
    assert scores == sorted(scores, reverse=True)


def wrong(page: Page) -> list[str]:
    """List what axe finds wrong with a page."""
    found = Axe().run(page).response["violations"]
    return [f"{each['id']}: {each['help']} {[node['html'][:100] for node in each['nodes']]}" for each in found]


LOOKS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "phone": PHONE,
}


@pytest.mark.parametrize("looks", LOOKS)
def test_axe_finds_nothing_wrong_with_a_ranking_and_a_refusal(open_page: Open, site: str, looks: str) -> None:
    page = ranked(open_page, site, 1.2, 0.4, -0.5, **LOOKS[looks])
    page.get_by_text("Options").click()
    assert wrong(page) == []
    page.unroute("**/v1/rank")
    page.route("**/v1/rank", answer(429, {"message": "later"}))
    rank(page, "one")
    expect(page.get_by_role("alert")).to_be_visible()
    assert wrong(page) == []


@pytest.mark.parametrize("looks", ["light", "dark"])
def test_axe_finds_nothing_wrong_with_the_api(open_page: Open, site: str, looks: str) -> None:
    page = open_page(site, "docs", **LOOKS[looks])
    expect(page.locator("article").first).to_be_visible()
    assert wrong(page) == []


def test_axe_finds_nothing_wrong_where_a_key_is_asked_for(open_page: Open, site_with_key: str) -> None:
    page = open_page(site_with_key)
    expect(page.get_by_label("API key")).to_be_visible()
    assert wrong(page) == []
