"""An OpenAI-compatible server that answers as tests tell it to."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tiny_chat import END, said


class FakeEndpoint:
    """Answers a conversation with the last user's text backwards, and the end of the turn.

    Attributes:
        requests: bodies of all completions asked for, in order.
        headers: of the same requests.
        respond: (number of the request, body) -> (status, headers, content), or None for an
            ordinary answer, or "drop" to cut the connection.
        gives_ids: whether answers hold token ids, as vLLM's do.
        is_down: every connection is cut.
        models: names that it serves.
        step: letters of an event of a stream.
        spell: (text of an answer) -> the text that is given in its place.
        events: (events of a stream) -> those that are sent in their place.
        drafts: steps, drafted and accepted tokens, and accepted by position, as /metrics counts
            them; None for a server without.
    """

    def __init__(self):
        self.requests, self.headers = [], []
        self.respond = lambda number, body: None
        self.gives_ids = True
        self.is_down = False
        self.models, self.step, self.drafts = [], 1, None
        self.spell = self.events = lambda given: given
        self._lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *arguments):
                pass

            def do_GET(self):
                if fake.is_down:
                    return self._drop()
                if self.path == "/metrics" and fake.drafts is not None:
                    return self._send(200, {}, fake.metrics())
                known = {"data": [{"id": name} for name in fake.models]}
                return self._send(*((200, {}, known) if "models" in self.path else (404, {}, {})))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if fake.is_down:
                    return self._drop()
                with fake._lock:
                    fake.requests.append(body)
                    fake.headers.append(dict(self.headers))
                    found = fake.respond(len(fake.requests), body)
                if found == "drop" or fake.is_down:
                    return self._drop()
                if found is None and body.get("stream"):
                    return self._stream(fake.events(fake.stream(self.path, body)))
                return self._send(*(found or (200, {}, fake.answer(self.path, body))))

            def _stream(self, events):
                """Send events as they are; one that is "drop" cuts the connection."""
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.send_header("connection", "close")
                self.end_headers()
                for event in events:
                    if event == "drop":
                        break
                    text = event if isinstance(event, str) else json.dumps(event)
                    self.wfile.write(f"data: {text}\n\n".encode())
                    self.wfile.flush()
                self.close_connection = True

            def _drop(self):
                self.close_connection = True
                self.connection.close()

            def _send(self, status, headers, content):
                text = content if isinstance(content, str) else json.dumps(content)
                self.send_response(status)
                for name, value in {**headers, "content-length": len(text.encode())}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(text.encode())

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128  # a connection that finds no place waits a second

            def handle_error(self, request, client_address):
                pass  # cut connections

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path, body):
        end = chr(32 + END)
        if path.endswith("/chat/completions"):
            read = "".join(f"{m['role'][0]}:{m['content']}{end}" for m in body["messages"]) + "a:"
            text = body["messages"][-1]["content"][::-1]
        else:
            read = "".join(chr(32 + token) for token in body["prompt"])
            text = read.removesuffix(f"{end}a:").rpartition(":")[2][::-1]
        text, limit = self.spell(text), body["max_tokens"]
        has_ended, text = len(text) < limit, text[:limit]
        choice = {"index": 0, "finish_reason": "stop" if has_ended else "length"}
        answer = {"choices": [choice], "usage": {"completion_tokens": len(text) + has_ended}}
        is_chat = path.endswith("/chat/completions")
        choice |= {"message": said(text)} if is_chat else {"text": text}
        if self.gives_ids and body.get("return_token_ids"):
            choice["token_ids"] = letters(text) + [END] * has_ended
            answer["prompt_token_ids"] = letters(read)
        return answer

    def stream(self, path, body):
        """Events of the answer, of `step` letters each; a drafting server counts one as a step."""
        whole = self.answer(path, body)
        (choice,) = whole["choices"]
        text, ids = choice["text"], choice.get("token_ids")
        events = []
        for first in range(0, len(text), self.step):
            piece = slice(first, first + self.step)
            events.append(
                {"choices": [{"text": text[piece]} | ({"token_ids": ids[piece]} if ids else {})]}
            )
            if self.drafts is not None and first:
                accepted = len(text[piece]) - 1
                self.drafts = [
                    now + more for now, more in zip(self.drafts, (1, 4, accepted), strict=False)
                ] + [now + (depth < accepted) for depth, now in enumerate(self.drafts[3:])]
        end = {"text": "", "finish_reason": choice["finish_reason"]}
        end |= {"token_ids": ids[len(text) :]} if ids else {}
        read = len(body["prompt"])
        return [
            *events,
            {"choices": [end]},
            {"choices": [], "usage": {**whole["usage"], "prompt_tokens": read}},
            "[DONE]",
        ]

    def metrics(self):
        names = ("drafts", "draft_tokens", "accepted_tokens")
        lines = [
            f"vllm:spec_decode_num_{n}_total {v}" for n, v in zip(names, self.drafts, strict=False)
        ]
        at = 'vllm:spec_decode_num_accepted_tokens_per_pos_total{position="%d"} %d'
        return "\n".join([*lines, *(at % each for each in enumerate(self.drafts[3:]))]) + "\n"


def letters(text):
    return [ord(letter) - 32 for letter in text]
