import http.server
import json
import socket
import threading
import time

import pytest

from lightning_align.data.hub import resolve_pretrained


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return tmp_path / "hub"


@pytest.fixture
def hub(monkeypatch, empty_cache):
    """A hub that knows one model."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.path.startswith("/api/models/acme/known")
            self.send_response(200 if known else 404)
            if not known:
                self.send_header("X-Error-Code", "RepoNotFound")
            body = json.dumps({"id": "acme/known"}).encode()
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(
        "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}"
    )
    yield
    server.shutdown()
    server.server_close()


def test_a_folder_is_fine(tmp_path):
    assert resolve_pretrained("DPOModule", "model", str(tmp_path)) == str(tmp_path)


def test_a_cached_name_is_fine_without_a_network(empty_cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = empty_cache / "models--acme--cached"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "snapshots" / "abc" / "config.json").write_text("{}")
    assert resolve_pretrained("DPOModule", "model", "acme/cached") == "acme/cached"


def test_the_hub_is_asked(hub):
    assert resolve_pretrained("DPOModule", "model", "acme/known") == "acme/known"
    with pytest.raises(ValueError, match="the hub has no such model"):
        resolve_pretrained("DPOModule", "model", "acme/unknown")


def test_offline_fails_at_once(empty_cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("lightning_align.data.hub.ask_hub", None)  # would fail if it was called
    with pytest.raises(ValueError, match=r"DPOModule\(model='acme/m'\).*HF_HUB_OFFLINE") as failure:
        resolve_pretrained("DPOModule", "model", "acme/m")
    assert str(empty_cache) in str(failure.value)
    assert "local folder" in str(failure.value)


def test_no_network_fails_naming_the_ways_out(empty_cache, monkeypatch):
    with socket.socket() as nobody:  # bound, but not listening: connections are refused
        nobody.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        with pytest.raises(ValueError, match="could not be reached") as failure:
            resolve_pretrained("DPOModule", "model", "acme/m")
    for way_out in (str(empty_cache), "HF_HUB_OFFLINE=1", "local folder"):
        assert way_out in str(failure.value)


def test_a_hub_that_never_answers_fails_within_ten_seconds(empty_cache, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("lightning_align.data.hub.TIMEOUT_S", 1.0)
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"did not answer|could not be reached"):
            resolve_pretrained("DPOModule", "model", "acme/m")
        assert time.monotonic() - began < 3


def test_a_client_that_hangs_beyond_its_own_timeout(empty_cache, monkeypatch):
    """A name server that never answers, for instance."""
    monkeypatch.setattr("lightning_align.data.hub.TIMEOUT_S", 0.2)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: time.sleep(3))
    began = time.monotonic()
    with pytest.raises(ValueError, match="did not answer within"):
        resolve_pretrained("DPOModule", "model", "acme/m")
    assert time.monotonic() - began < 2


def test_the_time_limit_is_below_ten_seconds():
    from lightning_align.data import hub

    assert hub.TIMEOUT_S < 10


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder", "a/b/c"])
def test_a_path_that_is_no_folder_is_never_looked_up(name):
    with pytest.raises(ValueError, match="is neither a folder nor a name"):
        resolve_pretrained("DPOModule", "model", name)
