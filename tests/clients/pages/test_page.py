"""The page at `/`: what a person types is ranked, and what the server says is shown, as text."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from tests.clients.conftest import KEY
from tests.clients.pages.chromium import asked

Open = Callable[..., Page]

INSTRUCTION = "What label best describes this news article?\nShares of the airline fell after it warned of its costs."
CANDIDATES = ["World", "Sports", "Business", "Science and technology"]
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"
LONG = "word " * 1000


def fill(page: Page, candidates: str, instruction: str = INSTRUCTION) -> None:
    page.get_by_label("Instruction").fill(instruction)
    page.get_by_label("Candidates", exact=True).fill(candidates)


def rank(page: Page, candidates: str, instruction: str = INSTRUCTION) -> None:
    fill(page, candidates, instruction)
    page.get_by_role("button", name="Rank").click()


def option(page: Page, name: str) -> None:
    page.get_by_text("Options").click()
    page.get_by_label(name).check()


def shown(page: Page) -> list[tuple[str, str]]:
    """List the candidates and scores that the page shows, in order."""
    items = page.locator("#ranking li")
    expect(items.first).to_be_visible()
    return [
        (item.locator(".text").inner_text(), item.locator(".score").inner_text().split()[-1]) for item in items.all()
    ]


def expected(address: str, candidates: list[str], **options: Any) -> list[tuple[str, str]]:
    """Ask the server itself, and write its scores as the page does."""
    results = asked(address, {"instruction": INSTRUCTION, "candidates": candidates, **options})["results"]
    return [(each["response"], f"{each['score']:.4f}".replace("-", "\u2212")) for each in results]


def answer(status: int, body: dict[str, Any], **headers: str) -> Callable[[Route], None]:
    """Answer in the server's stead, for what it does only under load, or with another model."""
    return lambda route: route.fulfill(status=status, json=body, headers=headers)


def ranking(*scores: float) -> dict[str, Any]:
    rest = {"tokens": 9, "is_truncated": False, "is_exact": False}
    results = [
        {"index": place, "response": f"text {place}", "score": score, **rest} for place, score in enumerate(scores)
    ]
    return {"model": "m", "device": "cpu", "precision": "fp32", "results": results, "tokens": 9, "truncated": 0}


def test_the_keyboard_alone_ranks_candidates_as_the_server_does(open_page: Open, site: str) -> None:
    page = open_page(site)
    expect(page.locator("#model")).to_contain_text("tokens of a pair")
    for _ in range(2):  # the link to the API, then the instruction
        page.keyboard.press("Tab")
    page.keyboard.insert_text(INSTRUCTION)
    page.keyboard.press("Tab")
    for candidate in CANDIDATES:
        page.keyboard.type(candidate)
        page.keyboard.press("Enter")
    page.keyboard.press("Control+Enter")
    assert shown(page) == expected(site, CANDIDATES)
    expect(page.get_by_label("Candidates", exact=True)).to_be_focused()  # who types goes on typing
    for _ in range(2):  # the options, then the button
        page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Fill in an example"


def test_a_screen_reader_hears_what_came_out(open_page: Open, site: str) -> None:
    page = open_page(site)
    rank(page, "\n".join(CANDIDATES))
    best, score = shown(page)[0]
    summary = page.locator("#summary")
    place = CANDIDATES.index(best) + 1
    expect(summary).to_have_text(f"4 candidates ranked. The best is candidate {place} with {score}.")
    assert summary.get_attribute("role") == "status"
    heard = page.get_by_role("list", name="Ranking").aria_snapshot()
    assert heard.count("listitem") == 4
    assert f"Score {score}" in heard
    assert f"candidate {place} · " in heard


def test_tokens_time_and_the_model_that_answered_are_told(open_page: Open, site: str) -> None:
    page = open_page(site)
    rank(page, "\n".join(CANDIDATES))
    shown(page)
    answered = asked(site, {"instruction": INSTRUCTION, "candidates": CANDIDATES})
    facts = page.locator("#facts").inner_text()
    assert f"{answered['model']}, {answered['precision']} on {answered['device']}" in facts
    assert f"{answered['tokens']} in 4 pairs" in facts
    assert all(f"{stage} " in facts for stage in ("tokenize", "queue", "score"))
    assert facts.count(" ms") == 5  # those, all of the server, and the round trip
    by_place = {each["index"]: each["tokens"] for each in answered["results"]}
    assert f"candidate 1 · {by_place[0]} tokens" in page.locator("#ranking").inner_text()


def test_truncation_is_said_in_words(open_page: Open, site: str) -> None:
    page = open_page(site)
    rank(page, f"short\n{LONG}")
    shown(page)
    assert "1 of them was truncated" in page.locator("#summary").inner_text()
    notes = page.locator("#ranking li", has_text="word word").locator(".notes")
    expect(notes).to_contain_text("truncated: it has too many tokens")
    assert page.locator(".notes", has_text="truncated").count() == 1


def test_what_cannot_be_ranked_is_said_and_the_candidate_is_found(open_page: Open, site: str) -> None:
    page = open_page(site)
    option(page, "refuse it")
    rank(page, f"short\n\n{LONG}\nlast")
    problem = page.get_by_role("alert")
    expect(problem).to_contain_text("The server cannot rank this.")
    assert page.locator("#ranking li").count() == 0
    problem.get_by_role("button", name="Go to candidate 2").click()
    selected = (
        "document.activeElement.value.slice(document.activeElement.selectionStart, document.activeElement.selectionEnd)"
    )
    assert page.evaluate(selected) == LONG


def test_an_old_ranking_goes_when_a_new_one_fails(open_page: Open, site: str) -> None:
    page = open_page(site)
    rank(page, "one\ntwo")
    shown(page)
    page.route("**/v1/rank", lambda route: route.abort())
    rank(page, "three")
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")
    assert page.locator("#ranking li").count() == 0
    assert page.locator("#summary").inner_text() == ""
    page.unroute("**/v1/rank")
    rank(page, "three")
    assert [text for text, _ in shown(page)] == ["three"]
    expect(page.get_by_role("alert")).to_be_hidden()


@pytest.mark.parametrize(
    ("status", "headers", "told"),
    [
        (429, {"retry-after": "3"}, "The server has too much to do. Try again in 3 seconds."),
        (429, {"retry-after": "1"}, "Try again in 1 second."),
        (503, {}, "The server cannot answer now. Try again in a moment."),
        (413, {}, "This is more than the server accepts at once."),
        (418, {}, "The server answered with status 418."),
    ],
)
def test_refusals_are_told_in_words(
    open_page: Open, site: str, status: int, headers: dict[str, str], told: str
) -> None:
    page = open_page(site)
    said = {"error": HOSTILE, "error_type": "overloaded", "message": HOSTILE, "pair": None}
    page.route("**/v1/rank", answer(status, said, **headers))
    rank(page, "one")
    problem = page.get_by_role("alert")
    expect(problem).to_contain_text(told)
    expect(problem).to_contain_text(HOSTILE)


def test_an_answer_that_is_not_ours_is_told(open_page: Open, site: str) -> None:
    page = open_page(site)
    page.route("**/v1/rank", lambda route: route.fulfill(status=200, body="<h1>Welcome to the proxy</h1>"))
    rank(page, "one")
    expect(page.get_by_role("alert")).to_contain_text("The answer is not JSON.")


def test_the_key_is_asked_for_once_and_leaves_with_the_tab(open_page: Open, site_with_key: str) -> None:
    page = open_page(site_with_key)
    key = page.get_by_label("API key")
    expect(key).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_have_text("The server does not accept this API key.")
    expect(key).to_be_focused()
    rank(page, "one\ntwo")
    expect(page.get_by_role("alert")).to_contain_text("does not accept this API key")
    expect(key).to_be_focused()
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    assert len(shown(page)) == 2  # what was refused is ranked, and need not be sent again
    expect(key).to_be_hidden()
    expect(page.locator("#model")).to_contain_text("tokens of a pair")
    assert page.evaluate("[localStorage.length, document.cookie, location.search]") == [0, "", ""]
    page.reload()
    expect(page.locator("#model")).to_contain_text("tokens of a pair")
    expect(key).to_be_hidden()
    another = page.context.new_page()
    another.goto(site_with_key)
    expect(another.get_by_label("API key")).to_be_visible()


def test_where_no_key_is_needed_none_is_asked_for(open_page: Open, site: str) -> None:
    page = open_page(site)
    expect(page.locator("#model")).to_contain_text("tokens of a pair")
    expect(page.get_by_label("API key")).to_be_hidden()


def test_texts_stay_texts(open_page: Open, site: str) -> None:
    page = open_page(site)
    texts = [HOSTILE, "&lt;b&gt;", "javascript:alert(1)", "'; alert(1); '", "a\u202eb\u0000c\u2028d"]
    rank(page, "\n".join(texts), instruction=HOSTILE)
    assert sorted(text for text, _ in shown(page)) == sorted(texts)
    assert page.locator("#answer img, #answer script, #answer b").count() == 0


def test_a_candidate_of_several_lines_is_sent_as_it_is(open_page: Open, site: str) -> None:
    page = open_page(site)
    option(page, "all text up to a line of ---")
    fill(page, "\n  one\n\n  more \n---\ntwo\n --- \n\n---\n")
    expect(page.locator("#count")).to_have_text("2 candidates")
    with page.expect_request("**/v1/rank") as found:
        page.keyboard.press("Control+Enter")
    assert json.loads(found.value.post_data or "")["candidates"] == ["  one\n\n  more ", "two"]
    assert len(shown(page)) == 2


def test_candidates_and_options_are_sent_as_they_are(open_page: Open, site: str) -> None:
    info = {"model": "m", "precision": "int8", "device": "cpu", "max_length": 512, "exact_winner": True}
    page = open_page(site, before=lambda page: page.route("**/info", answer(200, info)))
    option(page, "score them again in fp32")
    page.get_by_label("Best ones to show").fill("1")
    page.route("**/v1/rank", answer(200, ranking(0.9)))
    fill(page, "  spaces \n\n \n\tnext", instruction=" as it is\n")
    with page.expect_request("**/v1/rank") as found:
        page.keyboard.press("Control+Enter")
    assert json.loads(found.value.post_data or "") == {
        "instruction": " as it is\n",
        "candidates": ["  spaces ", "\tnext"],
        "top_n": 1,
        "exact_winner": True,
        "too_long": "truncate",
    }
    expect(page.locator("#summary")).to_contain_text("2 candidates ranked, the best 1 are shown.")


def test_fp32_is_offered_only_where_there_is_an_fp32_model(open_page: Open, site: str) -> None:
    page = open_page(site)  # of cappy-mini, whose bundle has int8 alone
    expect(page.locator("#model")).to_have_text("cappy-mini, int8 on cpu. It reads 512 tokens of a pair.")
    page.get_by_text("Options").click()
    expect(page.get_by_label("score them again in fp32")).to_be_hidden()


def test_too_many_candidates_are_told_before_they_are_sent(open_page: Open, site: str) -> None:
    page = open_page(site)
    expect(page.locator("#model")).to_contain_text("tokens of a pair")
    lines = "\n".join(map(str, range(1025)))  # Chromium takes seconds to type them
    page.get_by_label("Candidates", exact=True).evaluate("(area, lines) => (area.value = lines)", lines)
    page.get_by_label("Instruction").fill("counts again")
    expect(page.locator("#count")).to_have_text("1025 candidates, but a request may have only 1024")


def test_what_is_missing_is_asked_for_and_nothing_is_sent(open_page: Open, site: str) -> None:
    page = open_page(site)
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url))
    for instruction, candidates, told, label in [
        (" ", "a", "Type an instruction.", "Instruction"),
        ("a", " \n\n", "Type at least one candidate.", "Candidates"),
    ]:
        rank(page, candidates, instruction)
        expect(page.get_by_role("alert")).to_have_text(told)
        expect(page.get_by_label(label, exact=True)).to_be_focused()
        expect(page.get_by_label(label, exact=True)).to_have_attribute("aria-invalid", "true")
    assert not [url for url in sent if url.endswith("rank")]


def test_a_later_request_takes_the_place_of_an_earlier_one(open_page: Open, site: str) -> None:
    page = open_page(site)
    held: list[Route] = []
    page.route("**/v1/rank", lambda route: route.continue_() if held else held.append(route))
    with page.expect_request("**/v1/rank"):
        rank(page, "earlier")
    with page.expect_event("requestfailed"):  # the browser hangs up, and the server drops the work
        rank(page, "later")
    assert [text for text, _ in shown(page)] == ["later"]
