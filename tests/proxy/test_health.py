"""What `/health` says while all is well; the troubles are beside their tests."""

import pytest
from fake_upstream import chat
from starlette.responses import Response


def test_health_counts_what_was_recorded(proxy, upstream):
    proxy.ask(chat("a"))
    proxy.ask(chat("b"))
    health = proxy.health()
    assert health == {
        "status": "ok",
        "upstream": {"url": upstream.url, "reachable": True, "health_status": 200},
        "recording": True,
        "why_not": None,
        "recorded": 2,
        "skipped": {},
        "bytes": sum(len(line) + 1 for line in proxy.lines()),
        "file": "requests-00001.jsonl",
        "running": 0,
        "held_bytes": 0,
        "last_error": None,
    }


@pytest.mark.parametrize("status", [404, 503])
def test_an_upstream_that_answers_at_all_can_be_reached(proxy, upstream, status):
    async def respond(request):
        return Response(None, status)

    upstream.answer = respond
    assert proxy.health()["upstream"] == {
        "url": upstream.url,
        "reachable": True,
        "health_status": status,
    }


def test_the_upstream_is_not_asked_at_every_call(proxy, upstream):
    for _ in range(5):
        proxy.health()
    assert len(upstream.seen) == 1


def test_an_upstream_that_is_down_is_told_by_status_and_text(start_proxy, free_port):
    proxy = start_proxy(f"http://127.0.0.1:{free_port}")
    with proxy.client() as client:
        response = client.get("/health")
    assert response.status_code == 503
    state = response.json()
    assert (state["status"], state["recording"]) == ("upstream unreachable", True)
    assert state["upstream"]["reachable"] is False
