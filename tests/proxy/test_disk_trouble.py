"""Serving goes on whatever becomes of the disk, and says so."""

import errno
import os
import threading

from fake_upstream import PATIENCE_S, answer, chat


def test_a_full_disk_stops_recording_not_serving_and_both_go_on_after_it(start_proxy, upstream):
    full = threading.Event()

    def write(fd, line):
        if full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.write(fd, line)

    proxy = start_proxy(upstream.url, write=write)
    proxy.ask(chat("before"))
    full.set()
    for _ in range(3):
        assert proxy.ask(chat("lost")).json() == answer("hi")
    health = proxy.health()
    assert (health["status"], health["recording"]) == ("not recording", False)
    assert "No space left" in health["why_not"]
    assert "No space left" in health["last_error"]
    assert health["skipped"] == {"disk cannot be written": 3}
    assert sum("No space left" in line for line in proxy.said) == 1
    full.clear()
    proxy.ask(chat("after"))
    health = proxy.health()
    assert (health["status"], health["recording"], health["why_not"]) == ("ok", True, None)
    assert proxy.said[-1] == "recording goes on"
    texts = [record["request"]["messages"][0]["content"] for record in proxy.records()]
    assert texts == ["before", "after"]


def test_the_total_stops_recording_not_serving(start_proxy, upstream):
    proxy = start_proxy(upstream.url, max_total_bytes=700)
    answers = [proxy.ask(chat("a")).json() for _ in range(4)]
    assert answers == [answer("hi")] * 4
    health = proxy.health()
    assert health["recorded"] + health["skipped"]["--max-total reached"] == 4
    assert 0 < health["recorded"] < 4
    assert health["recording"] is False
    assert "700 bytes" in health["why_not"]
    assert sum("recording stopped" in line for line in proxy.said) == 1


def test_a_disk_that_hangs_does_not_hang_the_client(start_proxy, upstream):
    goes_on = threading.Event()

    def write(fd, line):
        assert goes_on.wait(PATIENCE_S)
        return os.write(fd, line)

    proxy = start_proxy(upstream.url, write=write, max_wait_s=0.01)
    assert proxy.ask(chat("a")).json() == answer("hi")
    assert proxy.records() == []
    assert proxy.health()["held_bytes"] > 0
    goes_on.set()
    proxy.eventually(lambda: proxy.health()["recorded"] == 1)
    assert proxy.health()["held_bytes"] == 0
    assert len(proxy.records()) == 1


def test_a_folder_that_is_removed_stops_recording_not_serving(start_proxy, upstream):
    proxy = start_proxy(upstream.url)
    proxy.ask(chat("a"))
    for path in proxy.folder.iterdir():
        path.unlink()
    proxy.folder.rmdir()
    assert proxy.ask(chat("b")).json() == answer("hi")
    assert "No such file" in proxy.health()["why_not"]
    proxy.folder.mkdir()
    proxy.ask(chat("c"))
    assert [record["request"] for record in proxy.records()] == [chat("c")]
