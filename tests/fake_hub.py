"""A hub on this machine: repositories are made, committed to and read, as its client asks."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


@contextmanager
def fake_hub():
    """Yield its address, its files {repository: {path: bytes}} and the requests it was sent."""
    repositories, asked = {}, []

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def _answer(self, content, status=200, **headers):
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_POST(self):
            size = int(self.headers.get("Content-Length", 0))
            lines = self.rfile.read(size).decode().splitlines()
            parts = self.path.split("?")[0].strip("/").split("/")
            asked.append((self.path, self.headers.get("Authorization")))
            if self.headers.get("Authorization") != "Bearer right":
                self._answer({"error": "Invalid credentials"}, 401)
            elif self.path == "/api/repos/create":
                given = json.loads(lines[0])
                name = f"{given.get('organization') or 'me'}/{given['name']}"
                repositories.setdefault(name, {})
                self._answer({"url": f"http://{self.headers['Host']}/{name}"})
            elif self.path == "/api/validate-yaml":
                self._answer({"errors": [], "warnings": []})
            elif "preupload" in parts:
                files = json.loads(lines[0])["files"]
                names = [each["path"] for each in files]
                modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
                self._answer({"files": modes})
            elif "commit" in parts:
                for each in map(json.loads, lines):
                    if each["key"] == "file":
                        content = base64.b64decode(each["value"]["content"])
                        repositories["/".join(parts[2:4])][each["value"]["path"]] = content
                where = "/".join(parts[2:4])
                url = f"http://{self.headers['Host']}/{where}/commit/{COMMIT}"
                self._answer({"success": True, "commitOid": COMMIT, "commitUrl": url})
            else:
                self._answer({"error": self.path}, 404)

        def do_GET(self):
            parts = self.path.split("?")[0].strip("/").split("/")
            asked.append((self.path, self.headers.get("Authorization")))
            if parts[0] == "api" and "/".join(parts[2:4]) in repositories:
                name = "/".join(parts[2:4])
                files = repositories[name]
                if "tree" in parts:
                    sizes = {path: len(content) for path, content in files.items()}
                    kinds = [{"type": "file", "path": p, "size": n} for p, n in sizes.items()]
                    self._answer([{**each, "oid": COMMIT} for each in kinds])
                    return
                siblings = [{"rfilename": path} for path in files]
                self._answer({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings})
            elif parts[2:3] == ["resolve"] and "/".join(parts[:2]) in repositories:
                content = repositories["/".join(parts[:2])].get("/".join(parts[4:]))
                if content is None:
                    self._answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
                    return
                mark = hashlib.sha256(content).hexdigest()
                self._answer(content, X_Repo_Commit=COMMIT, ETag=f'"{mark}"')
            else:
                self._answer({"error": "Repository Not Found"}, 404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", repositories, asked
    finally:
        server.shutdown()
