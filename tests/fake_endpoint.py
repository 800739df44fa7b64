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
    """

    def __init__(self):
        self.requests, self.headers = [], []
        self.respond = lambda number, body: None
        self.gives_ids = True
        self.is_down = False
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
                return self._send(200, {}, {"data": []})

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
                return self._send(*(found or (200, {}, fake.answer(self.path, body))))

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
        limit = body["max_tokens"]
        has_ended, text = len(text) < limit, text[:limit]
        choice = {"index": 0, "finish_reason": "stop" if has_ended else "length"}
        answer = {"choices": [choice], "usage": {"completion_tokens": len(text) + has_ended}}
        is_chat = path.endswith("/chat/completions")
        choice |= {"message": said(text)} if is_chat else {"text": text}
        if self.gives_ids and body.get("return_token_ids"):
            choice["token_ids"] = letters(text) + [END] * has_ended
            answer["prompt_token_ids"] = letters(read)
        return answer


def letters(text):
    return [ord(letter) - 32 for letter in text]
