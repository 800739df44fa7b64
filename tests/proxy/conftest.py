"""A fake upstream server and the proxy before it, each in a thread on a free port."""

import functools

import pytest
from fake_upstream import PATIENCE_S, FakeUpstream, Proxy, Served, answer, json_answer

from specdec.proxy.recorder import Recorder
from specdec.proxy.records import ProxyConfig, RecordFiles, parse_size
from specdec.proxy.server import Application, Upstream


@pytest.fixture(scope="module")
def upstream_server():
    app = FakeUpstream()
    served = Served(app)
    yield app, served
    served.stop()
    served.join()


@pytest.fixture
def upstream(upstream_server):
    """The fake upstream; it answers "hi" unless the test sets `answer`."""
    app, served = upstream_server
    app.seen.clear()
    app.left.clear()
    app.url = served.url
    app.answer = json_answer(answer("hi"))
    return app


@pytest.fixture(scope="module")
def stopped():
    """Proxies that were told to stop; they are waited for together, as each takes a moment."""
    proxies = []
    yield proxies
    for served in proxies:
        served.join()


@pytest.fixture
def start_proxy(tmp_path, stopped):
    """Starts a proxy; options, the recorder's attributes and an `append` may be given."""
    running = []

    def start(url, append=None, login="", hosts=None, recording=None, **options):
        config = ProxyConfig(upstream=url, out=tmp_path / "records", **options)
        files = RecordFiles(config.out, parse_size(config.max_file), parse_size(config.max_total))
        if append:
            files.append = functools.partial(append, files.append)
        said = []
        upstream = Upstream(url, PATIENCE_S, login)
        recorder = Recorder(config, files, upstream.secrets, said.append)
        vars(recorder).update(recording or {})
        served = Served(Application(upstream, recorder, said.append, hosts))
        running.append(served)
        return Proxy(served, config.out, said, recorder)

    yield start
    for served in running:
        served.stop()
        stopped.append(served)


@pytest.fixture
def proxy(start_proxy, upstream):
    return start_proxy(upstream.url)
