"""A Google Cloud Storage in memory: as much of its JSON API as gcsfs, TensorStore and google-cloud-storage call.

As in a bucket there are no folders, an object is there as a whole or not at all, writes and reads can depend on its
generation, and lists come in pages. There is one bucket; what is asked of another is not found.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit

BUCKET = "bucket"
PAGE = 20  # entries of a list's page; few, so that clients have to ask for the next


class FakeGCS(ThreadingHTTPServer):
    """The server: `objects` is {name: bytes} of what is in the bucket."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("localhost", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.uploads: dict[str, tuple[str, bytes]] = {}
        self.numbers = itertools.count(1)
        self.lock = threading.Lock()
        self.url = f"http://localhost:{self.server_port}"
        # That the clients come here, and look for no credentials; gcsfs would ask for the bucket's kind over gRPC.
        self.environment = {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "GOOGLE_CLOUD_PROJECT": "project",
            "FSSPEC_GCS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def put(self, name: str, data: bytes) -> None:
        self.objects[name], self.generations[name] = data, next(self.numbers)

    def about(self, name: str) -> dict[str, object]:
        md5 = base64.b64encode(hashlib.md5(self.objects[name]).digest()).decode()
        time = "2020-01-01T00:00:00.000Z"
        return {
            **{"kind": "storage#object", "bucket": BUCKET, "name": name, "size": str(len(self.objects[name]))},
            **{"generation": str(self.generations[name]), "metageneration": "1", "md5Hash": md5},
            **{"timeCreated": time, "updated": time, "contentType": "application/octet-stream"},
        }


@contextlib.contextmanager
def serve() -> Iterator[FakeGCS]:
    """A server that runs until the block ends."""
    with FakeGCS() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: FakeGCS
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer is sent in one piece

    def answer(self) -> None:
        """Any request: what it is about is in its path, /upload, /download or /batch, bucket and object's name."""
        url = urlsplit(self.path)
        self.query = dict(parse_qsl(url.query))
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.lock:
            if url.path.startswith("/batch/"):
                self.batch()
                return
            found = re.fullmatch(r"/(?:upload/|download/)?storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?", url.path)
            if not found or found[1] != BUCKET:
                self.send(404, {"error": {"code": 404, "message": f"no bucket: {url.path}"}})
            elif url.path.startswith("/upload/"):
                self.upload()
            elif found[2] is not None:
                self.one(found[2])
            elif url.path.endswith("/o"):
                self.send(200, self.page())
            else:
                self.send(200, {"kind": "storage#bucket", "name": BUCKET})

    do_GET = do_POST = do_PUT = do_DELETE = answer  # noqa: N815  as http.server names them

    def log_message(self, format: str, *args: object) -> None:
        pass

    def send(self, status: int, content: object = b"", headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def precondition_fails(self, name: str) -> bool:
        generation = str(self.server.generations.get(name, 0))
        wanted, unwanted = (self.query.get(f"ifGeneration{word}Match", "") for word in ("", "Not"))
        return wanted not in ("", generation) or unwanted == generation

    def one(self, rest: str) -> None:
        """Reads, describes, deletes, copies or moves an object."""
        name, *copy = map(unquote, re.split(rf"/rewriteTo/b/{BUCKET}/o/|/moveTo/o/", rest))
        data = self.server.objects.get(name)
        if data is None:
            self.send(404, {"error": {"code": 404, "message": f"no object: {name}"}})
        elif self.precondition_fails(name):
            self.send(304 if self.command == "GET" else 412)
        elif copy:
            self.server.put(copy[0], data)
            about = self.server.about(copy[0])
            if "/moveTo/" in rest:
                del self.server.objects[name], self.server.generations[name]
            self.send(200, about if "/moveTo/" in rest else {"done": True, "resource": about})
        elif self.command == "DELETE":
            del self.server.objects[name], self.server.generations[name]
            self.send(204)
        elif self.query.get("alt") != "media":
            self.send(200, self.server.about(name))
        else:
            headers = {"x-goog-generation": str(self.server.generations[name])}
            found = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
            if not found:
                self.send(200, data, headers)
                return
            start = int(found[1]) if found[1] else max(0, len(data) - int(found[2]))
            stop = min(len(data), int(found[2]) + 1 if found[1] and found[2] else len(data))
            if start >= len(data):
                self.send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            else:
                self.send(206, data[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    def page(self) -> dict[str, object]:
        """A page of the list of what starts with `prefix`, as objects and, with a delimiter, as common beginnings."""
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        entries = set()
        for name in self.server.objects:
            if name.startswith(prefix) and self.query.get("startOffset", "") <= name < self.query.get("endOffset", "~"):
                head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                entries.add((prefix + head + found, False) if found else (name, True))
        left = sorted(entry for entry in entries if entry[0] > self.query.get("pageToken", ""))
        shown = left[: min(PAGE, int(self.query.get("maxResults", PAGE)))]
        listed: dict[str, object] = {
            "kind": "storage#objects",
            "items": [self.server.about(name) for name, is_object in shown if is_object],
            "prefixes": [name for name, is_object in shown if not is_object],
        }
        return listed | ({"nextPageToken": shown[-1][0]} if len(left) > len(shown) else {})

    def upload(self) -> None:
        """An upload in one request, or in several, which follow the one that announces it."""
        name, data, kind = self.query.get("name", ""), self.body, self.query.get("uploadType")
        if "upload_id" in self.query:
            name, before = self.server.uploads[self.query["upload_id"]]
            data = before + data
            if self.headers["Content-Range"].endswith("/*"):
                self.server.uploads[self.query["upload_id"]] = name, data
                self.send(308, b"", {"Range": f"bytes=0-{len(data) - 1}"})
                return
        elif kind == "resumable":
            upload_id = str(next(self.server.numbers))
            self.server.uploads[upload_id] = name or json.loads(data)["name"], b""
            self.send(200, b"", {"Location": f"{self.server.url}{urlsplit(self.path).path}?upload_id={upload_id}"})
            return
        elif kind == "multipart":
            mark = b"--" + re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])[1].encode()
            _, about, data, _ = data.split(mark)
            about, data = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (about, data))
            name, data = json.loads(about)["name"], re.sub(rb"\r?\n\Z", b"", data)
        if self.precondition_fails(name):
            self.send(412)
        else:
            self.server.put(name, data)
            self.send(200, self.server.about(name))

    def batch(self) -> None:
        """Several deletions in one request."""
        parts = []
        for name in re.findall(rf"DELETE /storage/v1/b/{BUCKET}/o/(\S+?)(?:\?\S*)? HTTP", self.body.decode()):
            there = self.server.objects.pop(unquote(name), None) is not None
            self.server.generations.pop(unquote(name), None)
            parts.append(f"--part\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {204 if there else 404} .\r\n\r\n")
        self.send(200, ("".join(parts) + "--part--").encode(), {"Content-Type": "multipart/mixed; boundary=part"})
