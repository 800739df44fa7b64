"""What the proxy records is what `specdec collect` reads."""

import pytest
from fake_upstream import chat, delta, event, streaming
from starlette.responses import JSONResponse

from specdec.data.conversation import NoQueryError, asked_in
from specdec.data.sources import open_source


def collected(proxy):
    """The queries in the proxy's folder; None for a record without one."""
    for record in open_source(str(proxy.folder)):
        try:
            (asked,) = asked_in(record.value)
        except NoQueryError as error:
            yield error.reason
        else:
            yield asked.messages or asked.text, asked.answer


@pytest.mark.parametrize("ended", [True, False])
def test_a_recorded_stream_is_collected_with_its_answer_if_it_is_whole(proxy, upstream, ended):
    events = [delta(content="one"), delta(content=" two"), *[delta("stop")] * ended]
    upstream.answer = streaming(events)
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "Grüße?"}]
    proxy.ask({"model": "m", "messages": turns, "stream": True})
    assert list(collected(proxy)) == [(tuple(turns), "one two" if ended else None)]


def test_a_recorded_completion_is_collected(proxy, upstream):
    upstream.answer = streaming(
        [event({"choices": [{"index": 0, "text": "b", "finish_reason": "stop"}]}), event("[DONE]")]
    )
    proxy.ask({"prompt": "a", "model": "m"}, "/v1/completions")
    assert list(collected(proxy)) == [("a", "b")]


@pytest.mark.parametrize(("status", "is_query"), [(400, False), (429, True), (500, True)])
def test_a_request_that_was_wrong_in_itself_is_no_query(proxy, upstream, status, is_query):
    async def refuse(request):
        return JSONResponse({"error": {"message": "no"}}, status)

    upstream.answer = refuse
    proxy.ask(chat("a"))
    asked = (({"role": "user", "content": "a"},), None) if is_query else "refused"
    assert list(collected(proxy)) == [asked]
