"""A hub on this machine, for the tests that fetch models and data sets through huggingface_hub."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHA = "c0ffee" + "0" * 34


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as huggingface_hub asks of it; `server.repos` is {id: folder}."""

    def answer(self, status, body, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def answer_file(self, path, fetched):
        body = path.read_bytes()
        headers = {"ETag": f'"{path.parent.name}-{path.name}"', "X_Repo_Commit": SHA}
        if self.command == "HEAD":
            return self.answer(200, body, **headers)
        self.server.fetched[fetched] += 1
        if "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            return self.answer(206, body[start:], Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}", **headers)
        if path.name in self.server.cut_once:
            self.server.cut_once.remove(path.name)
            return self.answer(200, body[: len(body) // 2], **headers, Content_Length=len(body))
        return self.answer(200, body, **headers)

    def do_GET(self):
        path = self.path.partition("?")[0].strip("/")
        path = re.sub("^(api/models|api/datasets|datasets)/", "", path)
        folder = self.server.repos.get("/".join(path.split("/")[:2]))
        rest = path.split("/")[2:]
        if folder is None:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        file = folder.joinpath(*rest[2:])
        if rest[:1] == ["resolve"] and file.is_file():
            return self.answer_file(file, path.replace(f"resolve/{SHA}/", ""))
        files = [p for p in folder.rglob("*") if p.is_file()]
        sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in files}
        if rest[:1] == ["tree"]:
            return self.answer(200, [{"type": "file", "path": n, "size": s, "oid": n} for n, s in sizes.items()])
        if rest in ([], ["revision", "main"]):
            return self.answer(200, {"id": path, "sha": SHA, "siblings": [{"rfilename": n} for n in sizes]})
        return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@contextmanager
def hub(repos, cut_once):
    """The server, which answers until it is shut down, and the variables that point huggingface_hub at it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos = repos
    server.cut_once = set(cut_once)
    server.fetched = Counter()
    thread = threading.Thread(target=server.serve_forever, args=[0.05], daemon=True)
    thread.start()
    no_proxy = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    yield server, {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_TELEMETRY": "1", **no_proxy}
    server.shutdown()
    thread.join()


def environment(**variables):
    own = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}  # other tests' hub is offline
    return own | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables


@contextmanager
def asking(program, **variables):
    """A function that gives a line to `program`, which answers with a line of JSON. It runs in a fresh interpreter,
    since huggingface_hub reads its environment once."""
    command = [sys.executable, "-c", program]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment(**variables)) as process:

        def ask(id):
            print(id, file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()
