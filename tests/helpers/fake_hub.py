"""A Hugging Face hub on this machine: what a client asks when it loads a dataset, and no more."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
from urllib.parse import parse_qs, unquote, urlparse

COMMIT = "c" * 40


class FakeHub:
    """Datasets by name, such as {"acme/known": {"data/train.jsonl": b"..."}}."""

    def __init__(self, datasets):
        self.datasets = datasets

    def answer(self, url, body):
        """Status, headers and body."""
        path = urlparse(url).path
        found = re.fullmatch(r"/(?:api/)?datasets/([^/]+/[^/]+)(?:/([^/]+)/[^/]+/?(.*))?", path)
        if found is None:
            return 404, {}, b""
        name, action, file = found[1], found[2] or "revision", unquote(found[3] or "")
        if name not in self.datasets:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        files = self.datasets[name]
        if action == "revision":
            siblings = [{"rfilename": file} for file in files]
            return 200, {}, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()
        if action == "resolve":
            return self._resolve(files, file)
        if action == "tree":
            entries = self._tree(files, file, "recursive=true" in url.lower())
        else:
            entries = [self._entry(files, path) for path in parse_qs(body.decode())["paths"]]
            entries = [entry for entry in entries if entry is not None]
        return 200, {}, json.dumps(entries).encode()

    def _resolve(self, files, file):
        if file not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        etag = hashlib.sha1(files[file]).hexdigest()
        return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, files[file]

    def _tree(self, files, folder, recursive):
        prefix = f"{folder}/" if folder else ""
        below = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
        names = below if recursive else sorted({name.partition("/")[0] for name in below})
        return [self._entry(files, prefix + name) for name in names]

    def _entry(self, files, path):
        if path in files:
            oid = hashlib.sha1(files[path]).hexdigest()
            return {"type": "file", "path": path, "size": len(files[path]), "oid": oid}
        if any(file.startswith(f"{path}/") for file in files):
            return {"type": "directory", "path": path, "oid": "0" * 40}
        return None


@contextlib.contextmanager
def serve(hub):
    """The hub's URL while it is up, and a function that takes it down."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            length = int(self.headers.get("Content-Length", 0))
            status, headers, body = hub.answer(self.path, self.rfile.read(length))
            begin, partial = 0, re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if status == 200 and partial:
                begin, end = int(partial[1]), int(partial[2] or len(body) - 1) + 1
                headers = {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{len(body)}"}
                status, body = 206, body[begin:end]
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_POST = do_GET  # noqa: N815

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def stop():
        server.shutdown()
        server.server_close()

    try:
        yield f"http://127.0.0.1:{server.server_port}", stop
    finally:
        stop()
