"""A W&B server small enough to read: what `wandb sweep`, `wandb agent` and the runs of an agent ask of it, and no more.

It answers the GraphQL operations by name and keeps what the client sends. What it cannot answer is in ``unknown``.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

OWNER = {"id": "owner", "name": "someone"}
SWEEP = "sweep1"


@dataclass
class Run:
    """What reached the server of one run."""

    sweeps: list[str | None] = field(default_factory=list)  # of each time that it was created or changed
    config: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)  # of the history, as JSON
    summary: dict[str, Any] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]


class FakeWandb:
    """Hands the agent one run after the other and then tells it to exit.

    Args:
        runs: (id, swept values) of each.
        kill_when: once this file exists, the agent is told to exit, which kills its run.
    """

    def __init__(self, runs: Sequence[tuple[str, Mapping[str, Any]]], kill_when: Path | None = None) -> None:
        self.kill_when = kill_when
        self.queue = list(runs)
        self.config = ""
        self.project = ""
        self.runs: dict[str, Run] = {}
        self.unknown: list[str] = []
        self.url = ""

    def answer(self, query: str, given: Mapping[str, Any]) -> dict[str, Any]:
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        method = getattr(self, f"on_{found.group(1)}" if found else "", None)
        if method is None:
            self.unknown.append(query)
            return {}
        return method(given)

    # --- what the commands ask

    def on_Viewer(self, given):
        return {"viewer": {"id": "me", "entity": OWNER["name"], "username": OWNER["name"], "flags": "{}"}}

    def on_UpsertSweep(self, given):
        self.config, self.project = given["config"], given["projectName"]
        sweep = {"name": SWEEP, "project": {"id": "project", "name": self.project, "entity": OWNER}}
        return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}

    def on_SweepWithRuns(self, given):
        found = (given["entity"], given["project"], given["sweep"]) == (OWNER["name"], self.project, SWEEP)
        sweep = {"id": SWEEP, "name": SWEEP, "config": self.config, "runs": {"edges": []}} if found else None
        return {"project": {"sweep": sweep}}

    def on_CreateAgent(self, given):
        return {"createAgent": {"agent": {"id": "agent"}}}

    def on_Heartbeat(self, given):
        running = json.loads(given["runState"])
        if self.kill_when and self.kill_when.exists():
            self.kill_when = None
            commands = [{"type": "exit"}]
        elif running:
            commands = []
        elif self.queue:
            name, values = self.queue.pop(0)
            args = {key: {"value": value} for key, value in values.items()}
            commands = [
                {"type": "run", "run_id": name, "program": yaml.safe_load(self.config)["program"], "args": args}
            ]
        else:
            commands = [{"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}

    # --- what a run asks

    def on_RunResumeStatus(self, given):
        bucket, run = None, self.runs.get(given["name"])
        if run is not None:
            bucket = {
                **{"id": given["name"], "name": given["name"], "config": json.dumps(run.config)},
                **{"summaryMetrics": json.dumps(run.summary), "historyLineCount": len(run.lines)},
                **{"historyTail": json.dumps(run.lines[-1:]), "eventsTail": "[]"},
                **{"logLineCount": 0, "eventsLineCount": 0, "wandbConfig": json.dumps(run.config["_wandb"]["value"])},
            }
        return {"model": {"id": "project", "name": self.project, "entity": OWNER, "bucket": bucket}}

    def on_UpsertBucket(self, given):
        run = self.runs.setdefault(given["name"], Run())
        run.sweeps.append(given["sweep"])
        run.config = json.loads(given["config"])
        project = {"id": "project", "name": given["project"], "entity": OWNER}
        bucket = {"id": given["name"], "name": given["name"], "project": project, "historyLineCount": len(run.lines)}
        return {"upsertBucket": {"bucket": bucket, "inserted": len(run.sweeps) == 1}}

    def on_ProbeServerCapabilities(self, given):  # of older clients
        return {name: {"fields": []} for name in ("QueryType", "MutationType", "ServerInfoType")}

    def on_RunStoppedStatus(self, given):
        return {"project": {"run": {"stopped": False}}}

    def on_ServerFeaturesQuery(self, given):
        return {"serverInfo": {"features": []}}

    def on_CreateRunFiles(self, given):
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def stream(self, run: Run, sent: Mapping[str, Any]) -> None:
        """What a run sends while it runs."""
        files = sent.get("files") or {}
        if "wandb-history.jsonl" in files:
            chunk = files["wandb-history.jsonl"]
            run.lines[chunk["offset"] :] = chunk["content"]
        if "wandb-summary.json" in files:
            run.summary = json.loads(files["wandb-summary.json"]["content"][0])
        if sent.get("complete"):
            run.exit_codes.append(sent["exitcode"])


@contextlib.contextmanager
def served(fake: FakeWandb) -> Iterator[None]:
    """While inside, a server at ``fake.url``."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer: dict[str, Any] = {}
            if self.path == "/graphql":
                sent = json.loads(body)
                answer = {"data": fake.answer(sent["query"], sent.get("variables") or {})}
            elif stream := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
                fake.stream(fake.runs[stream.group(1)], json.loads(body))
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_PUT = do_POST  # files; not kept

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            """A client that was killed."""

    server = Server(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
