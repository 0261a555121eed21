"""W&B's GraphQL server as far as reports and workspaces need it, on loopback."""

from __future__ import annotations

import gzip
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USER = {
    "id": "VXNlcjox",
    "username": "me",
    "entity": "ent",
    "name": "me",
    "email": "me@example.org",
    "admin": False,
    "flags": "{}",
    "apiKeys": {"edges": []},
    "teams": {"edges": []},
    "deletedAt": None,
    "defaultEntity": {"name": "ent", "id": "e1"},
}
PROJECT = {
    "__typename": "Project",
    "id": "UHJvamVjdDox",
    "internalId": "UHJvamVjdEludGVybmFsSWQ6MQ==",
    "name": "proj",
    "entityName": "ent",
    "entity": {"name": "ent"},
    "user": USER,
    "createdAt": "2024-01-01T00:00:00",
    "isBenchmark": False,
    "description": "",
    "access": "USER_READ",
    "views": "{}",
    "runCount": 1,
    "isPublic": False,
    "kind": "MODELS",
    "lastActive": None,
    "readOnly": False,
    "state": None,
    "tags": [],
}
TOKEN = "share-token"
"""What a share link is made with."""


def _connection(nodes: list[Any]) -> dict[str, Any]:
    edges = [{"node": node, "cursor": "c"} for node in nodes]
    return {"edges": edges, "pageInfo": {"hasNextPage": False, "endCursor": None}}


@dataclass
class GraphQLServer:
    """Answers what W&B would, and remembers what it was asked. A context manager.

    Attributes:
        operations: Name and variables of each operation, in order.
        bodies: What was sent, without headers.
        views: Saved reports and workspaces by id.
        refuses: Whether every mutation is answered by an error.
    """

    operations: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    bodies: list[str] = field(default_factory=list)
    views: dict[str, dict[str, Any]] = field(default_factory=dict)
    refuses: bool = False

    def __enter__(self) -> GraphQLServer:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def sent(self, name: str) -> list[dict[str, Any]]:
        """Variables of all operations of this name."""
        return [variables for operation, variables in self.operations if operation == name]

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request."""
        kind, name = re.findall(r"\b(query|mutation)\s+(\w+)", query)[0]
        self.operations.append((name, variables))
        if self.refuses and kind == "mutation":
            return {"errors": [{"message": "permission denied"}]}
        if name in ("upsertView", "UpsertView2"):
            data = self._upserted(variables)
        elif name == "createAccessToken":
            data = {"createAccessToken": {"accessToken": {"token": TOKEN, "type": "PUBLIC"}}}
        elif name == "ViewAccessTokens":
            data = {"view": {"accessTokens": []}}
        elif name == "View":
            own = [view for view in self.views.values() if view["name"] == variables["viewName"]]
            data = {"project": {"allViews": _connection(own)}}
        elif name == "SpecificReport":
            data = {"view": self.views[variables["reportId"]]}
        else:
            server = {"cliVersionInfo": {"max_cli_version": "99"}, "latestLocalVersionInfo": None, "features": []}
            entity = {"id": "e1", "name": "ent", "projects": _connection([PROJECT])}
            data = {
                "viewer": USER,
                "serverInfo": server,
                "models": _connection([PROJECT]),
                "project": PROJECT,
                "entity": entity,
            }
        return {"data": data}

    def _upserted(self, variables: dict[str, Any]) -> dict[str, Any]:
        inserted = not variables.get("id")
        view_id = f"view{len(self.views)}" if inserted else variables["id"]
        project = {"id": "1", "name": variables["projectName"], "entityName": variables["entityName"]}
        times = {"createdAt": "2024-01-01T00:00:00", "updatedAt": "2024-01-01T00:00:00"}
        self.views[view_id] = {**variables, "id": view_id, "project": project, **times}
        return {"upsertView": {"view": self.views[view_id], "inserted": inserted}}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._send({})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                server.bodies.append(body.decode())
                request = json.loads(body)
                self._send(server.answer(request["query"], request.get("variables") or {}))

            def log_message(self, *_: object) -> None:
                pass

            def _send(self, content: dict[str, Any]) -> None:
                body = json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        return Handler
