"""Published weights, from a server on this machine: checked, whole, and never half."""

import hashlib
import http.server
import threading

import pytest

from castling_jax.convert import fetch as module
from castling_jax.convert.fetch import PUBLISHED, Published, fetch
from castling_jax.models.registry import MODELS

CONTENT = b"weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """/hub states the digest and leads to /file; /bare has no digest; /cut breaks off."""

    def do_GET(self):
        if self.path == "/hub":
            self.send_response(302)
            self.send_header("X-Linked-ETag", f'"{DIGEST}"')
            self.send_header("Location", "/file")
            self.end_headers()
            return
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: 100 if self.path == "/cut" else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{served.server_port}"
    sources = {"file": DIGEST[:8], "hub": None, "bare": None, "cut": DIGEST[:8], "missing": "00", "wrong": "00000000"}
    published = {name: Published(f"{address}/{name}", digest, f"{name}.pth") for name, digest in sources.items()}
    monkeypatch.setattr(module, "PUBLISHED", published)
    yield
    served.shutdown()
    served.server_close()


@pytest.mark.parametrize("name", ["file", "hub"])
def test_a_file_is_fetched_and_checked(server, tmp_path, name):
    path = fetch(name, tmp_path / "new" / "folder")
    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == [f"{name}.pth"]
    inode = path.stat().st_ino
    assert fetch(name, path.parent) == path
    assert path.stat().st_ino == inode  # not downloaded anew


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wrong", "is not the published file: its SHA-256 does not begin with 00000000"),
        ("cut", "is not the published file"),
        ("bare", "does not state its SHA-256"),
        ("missing", "cannot be fetched"),
        ("nothing", "unknown published weights 'nothing'"),
    ],
)
def test_what_is_not_whole_is_refused_and_leaves_nothing(server, tmp_path, refuses, name, said):
    with refuses(said):
        fetch(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file", "hub"])
def test_a_file_that_is_there_is_checked(server, tmp_path, refuses, name):
    (tmp_path / f"{name}.pth").write_bytes(CONTENT[:100])
    with refuses(f"{name}.pth' is not the published file, or only a part of it: remove it"):
        fetch(name, tmp_path)


def test_every_model_has_published_weights():
    assert {name.removesuffix("_distilled") for name in PUBLISHED} == set(MODELS) - {"deit_micro"}
    assert all(source.url.startswith("https://") for source in PUBLISHED.values())
    assert len({source.file for source in PUBLISHED.values()}) == len(PUBLISHED)
