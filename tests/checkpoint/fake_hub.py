"""A local server that imitates huggingface.co."""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """A server with repositories, which maps name and revision to the files of a commit."""

    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """Methods and paths of all requests."""
    goes_on: threading.Event = field(default_factory=threading.Event)
    """Event that tiny/slow waits for in the middle of its weights."""
    url: str = ""

    def files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return the commit and its files, or None."""
        for known, files in self.repositories[name].items():
            commit = hashlib.sha1(f"{name}@{known}".encode()).hexdigest()
            if revision in (known, commit):
                return commit, files
        return None

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body as huggingface.co would."""
        match = re.fullmatch(
            r"/(?:api/models/)?([^/]+/[^/]+)/(revision|tree|resolve)/([^/]+)/?(.*)", path
        )
        if not match or match[1] not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if match[1] == "tiny/down":
            return 503, {}, b""
        found = self.files(match[1], unquote(match[3]))
        if found is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        commit, files = found
        if match[2] == "revision":
            siblings = [{"rfilename": file} for file in files]
            return (
                200,
                {},
                json.dumps({"id": match[1], "sha": commit, "siblings": siblings}).encode(),
            )
        if match[2] == "tree":
            tree = [
                {
                    "type": "file",
                    "path": file,
                    "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
                for file, data in files.items()
            ]
            return 200, {}, json.dumps(tree).encode()
        if match[1] == "tiny/gated":
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if match[4] not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        data = files[match[4]]
        digest = hashlib.sha256(data).hexdigest()
        headers = {
            "ETag": f'"{digest}"',
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(len(data)),
            "X-Linked-ETag": f'"{digest}"',
            "X-HF-Warning": "topic; \x1b[2J a server's words",
        }
        return 200, headers, data


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            hub.asked.append(f"{self.command} {path}")
            status, headers, body = hub.answer(path)
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                is_slow = path.startswith("/tiny/slow/") and path.endswith("/model.safetensors")
                self.wfile.write(body[: len(body) // 2] if is_slow else body)
                if is_slow:
                    hub.goes_on.wait(60)
                    self.close_connection = True

        do_HEAD = do_GET

        def log_message(self, *words: object) -> None:
            pass

    return Handler
