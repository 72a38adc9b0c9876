"""A Google Cloud Storage in memory: as much of its JSON API as gcsfs, TensorStore and google-cloud-storage call here.

As in a bucket there are no folders, an object is there as a whole or not at all, reads and writes can depend on its
generation, and lists come in pages. There is one bucket; what is asked of another is not found.
"""

import contextlib
import itertools
import json
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit

PAGE = 20  # entries of a list's page; few, so that clients have to ask for the next


class FakeGCS(ThreadingHTTPServer):
    """The server: `objects` is {name: (bytes, generation)} of what is in gs://bucket."""

    daemon_threads = True
    bucket_status = 200  # of an answer about the bucket itself; 403 for those that may not know

    def __init__(self) -> None:
        super().__init__(("localhost", 0), _Handler)
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.uploads: dict[str, tuple[str, bytes]] = {}
        self.numbers = itertools.count(1)
        self.lock = threading.Lock()
        self.url = f"http://localhost:{self.server_port}"
        # That clients come here and look for no credentials; gcsfs would ask for the bucket's kind over gRPC.
        self.environment = {
            **{"STORAGE_EMULATOR_HOST": self.url, "TENSORSTORE_GCS_HTTP_URL": self.url},
            **{"GOOGLE_AUTH_TOKEN_FOR_TESTING": "token", "FSSPEC_GCS_TOKEN": "anon", "GOOGLE_CLOUD_PROJECT": "project"},
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that was killed
            super().handle_error(request, client_address)


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
        found = re.fullmatch(r"/(upload/|download/)?storage/v1/b/bucket(/o)?(?:/(.*))?", url.path)
        with self.server.lock:
            if url.path.startswith("/batch/"):
                self.delete_several()
            elif not found:
                self.send(404)
            elif found[1] == "upload/":
                self.upload()
            elif found[3]:
                self.one(*map(unquote, found[3].split("/moveTo/o/")))
            elif found[2]:
                self.send(200, self.page())
            else:
                self.send(self.server.bucket_status, {"kind": "storage#bucket", "name": "bucket"})

    do_GET = do_POST = do_PUT = do_DELETE = answer  # noqa: N815  as http.server names them

    def log_message(self, format: str, *args: object) -> None:
        pass

    def send(self, status: int, content: object = b"", **headers: object) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"content_length": len(data), "content_type": "application/json"} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(data)

    def about(self, name: str) -> dict[str, object]:
        data, generation = self.server.objects[name]
        times = dict.fromkeys(("timeCreated", "updated"), "2020-01-01T00:00:00.000Z")
        return {"bucket": "bucket", "name": name, "size": str(len(data)), "generation": str(generation), **times}

    def is_other_generation(self, name: str) -> bool:
        generation = str(self.server.objects.get(name, (b"", 0))[1])
        wanted, unwanted = (self.query.get(f"ifGeneration{word}Match", "") for word in ("", "Not"))
        return wanted not in ("", generation) or unwanted == generation

    def one(self, name: str, new_name: str = "") -> None:
        """Moves, deletes, describes or reads an object."""
        if name not in self.server.objects:
            self.send(404)
        elif self.is_other_generation(name):
            self.send(304 if self.command == "GET" else 412)
        elif new_name:
            self.server.objects[new_name] = self.server.objects.pop(name)
            self.send(200, self.about(new_name))
        elif self.command == "DELETE":
            del self.server.objects[name]
            self.send(204)
        elif self.query.get("alt") != "media":
            self.send(200, self.about(name))
        else:
            data, generation = self.server.objects[name]
            part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start, stop = (int(part[1]), min(int(part[2] or len(data)) + 1, len(data))) if part else (0, len(data))
            where = {"content_range": f"bytes {start}-{stop - 1}/{len(data)}"} if part else {}
            status = 416 if part and start >= len(data) else 206 if part else 200
            self.send(status, data[start:stop], x_goog_generation=generation, **where)

    def page(self) -> dict[str, object]:
        """A page of the list of what starts with `prefix`: objects and, with a delimiter, common beginnings."""
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        entries = set()
        for name in self.server.objects:
            if name.startswith(prefix) and self.query.get("startOffset", "") <= name < self.query.get("endOffset", "~"):
                head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                entries.add((prefix + head + found, False) if found else (name, True))
        left = sorted(entry for entry in entries if entry[0] > self.query.get("pageToken", ""))
        shown = left[: min(PAGE, int(self.query.get("maxResults", PAGE)))]
        items = [self.about(name) for name, is_object in shown if is_object]
        prefixes = [name for name, is_object in shown if not is_object]
        token = {"nextPageToken": shown[-1][0]} if len(left) > len(shown) else {}
        return {"kind": "storage#objects", "items": items, "prefixes": prefixes, **token}

    def upload(self) -> None:
        """An upload in one request, or in several, of which the first announces it."""
        name, data = self.query.get("name", ""), self.body
        if "upload_id" in self.query:
            name, before = self.server.uploads.pop(self.query["upload_id"])
            data = before + data
            if self.headers["Content-Range"].endswith("/*"):
                self.server.uploads[self.query["upload_id"]] = name, data
                self.send(308, range=f"bytes=0-{len(data) - 1}")
                return
        elif self.query["uploadType"] == "resumable":
            number = str(next(self.server.numbers))
            self.server.uploads[number] = name, b""
            self.send(200, location=f"{self.server.url}{urlsplit(self.path).path}?upload_id={number}")
            return
        elif self.query["uploadType"] == "multipart":
            mark = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])[1]
            # gcsfs ends lines with \n, google-cloud-storage with \r\n.
            parts = [re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in data.split(f"--{mark}".encode())[1:3]]
            name, data = json.loads(parts[0])["name"], re.sub(rb"\r?\n\Z", b"", parts[1])
        if self.is_other_generation(name):
            self.send(412)
        else:
            self.server.objects[name] = data, next(self.server.numbers)
            self.send(200, self.about(name))

    def delete_several(self) -> None:
        parts = []
        for name in re.findall(r"DELETE /storage/v1/b/bucket/o/(\S+) HTTP", self.body.decode()):
            status = 204 if self.server.objects.pop(unquote(name), None) else 404
            parts.append(f"--part\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status} .\r\n\r\n")
        self.send(200, ("".join(parts) + "--part--").encode(), content_type="multipart/mixed; boundary=part")
