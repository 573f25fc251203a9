"""The warm restart's request set, and what is told of it."""

from __future__ import annotations

from benchmarks.served_prompts import PAGE_TOKENS, Asked, found_percent
from benchmarks.warm_restart import (
    EFFORTS,
    QUESTION_TOKENS,
    SERVED,
    distinct_bytes,
    page_bytes,
    rate_rows,
    request_set,
)

QUICK = EFFORTS["quick"]


def test_the_request_set_is_the_same_each_time_and_shares_documents_but_no_question() -> None:
    prompts = request_set(QUICK)
    assert prompts == request_set(QUICK)
    assert len(prompts) == QUICK.requests
    documents = {tuple(prompt[: QUICK.document_tokens]) for prompt in prompts}
    questions = {tuple(prompt[QUICK.document_tokens :]) for prompt in prompts}
    assert 1 < len(documents) <= QUICK.documents < len(questions) == QUICK.requests
    assert {len(question) for question in questions} == {QUESTION_TOKENS}


def test_pages_of_a_common_beginning_count_once() -> None:
    one, other = list(range(4 * PAGE_TOKENS)), [*range(3 * PAGE_TOKENS), *range(1000, 1000 + PAGE_TOKENS)]
    assert distinct_bytes([one, one]) == 4 * page_bytes(SERVED)
    assert distinct_bytes([one, other]) == 5 * page_bytes(SERVED)


def test_the_hit_rate_is_told_before_and_after_over_all_tokens() -> None:
    asked = [Asked(1.0, 300, 0), Asked(0.5, 100, 100)]
    assert found_percent(asked) == 25.0
    rows = rate_rows(asked, asked, [Asked(2.0, 400, 50)], ", Redis too")
    figures = {row.name: row.figure.median for row in rows if row.unit == "% of tokens"}
    assert figures["hit rate of the same requests, before SIGKILL of everything, Redis too"] == 25.0
    assert figures["hit rate of the same requests, after SIGKILL of everything, Redis too"] == 12.5
    assert rows[2].peer is not None
    assert rows[2].peer.ratio == 0.5
