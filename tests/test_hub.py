"""FineWeb-Edu is streamed from the hub; a build continues with the commit that it began with."""

import hashlib
import http.server
import json
import re
import threading

import pytest

from conftest import run
from test_shards import TEXTS, list_shards, reference, refusal, tokens_of, two_files

REPO = "HuggingFaceFW/fineweb-edu"
OLD, NEW = "c0ffee" + "0" * 34, "decade" + "0" * 34  # two commits
FOLDERS = dict.fromkeys(["data", "data/CC", "sample", "sample/10BT"], b"")
README = b"""---
configs:
- {config_name: default, data_files: [{split: train, path: data/*/*}]}
- {config_name: sample-10BT, data_files: [{split: train, path: sample/10BT/*}]}
---
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as datasets and huggingface_hub need. That the real hub answers
    like this cannot be tested without a network."""

    protocol_version = "HTTP/1.1"

    def answer(self, body, status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in (headers | {"Content_Length": len(body)}).items():
            self.send_header(key.replace("_", "-"), str(value))
        self.send_header("X-Repo-Commit", self.server.head)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.replace("%2F", "/").partition("?")[0]
        commit = next((c for c in (OLD, NEW) if c in path), self.server.head)
        files = self.server.commits[commit]
        if re.fullmatch(rf"/api/datasets/{REPO}(/revision/\w+)?", path):
            return self.answer({"id": REPO, "sha": commit, "siblings": []})
        if match := re.fullmatch(rf"/api/datasets/{REPO}/tree/\w+/?(.*)", path):
            listing = [
                {"path": name, "type": type_, "oid": "0", "size": len(data)}
                for type_, entries in [("directory", FOLDERS), ("file", files)]
                for name, data in entries.items()
                if name.startswith(match[1])
            ]
            return self.answer(listing)
        data = files.get(path.partition(f"/resolve/{commit}/")[2])
        if data is None:
            return self.answer({"error": "not found"}, 404, X_Error_Code="EntryNotFound")
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        if bounds := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or ""):
            part = data[int(bounds[1]) : int(bounds[2]) + 1]
            given = f"bytes {bounds[1]}-{bounds[2]}/{len(data)}"
            return self.answer(part, 206, ETag=etag, Content_Range=given)
        self.answer(data, ETag=etag)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path):
    """A server with two commits, of which only the old one has the texts."""
    files = {"README.md": README, "data/CC/0.parquet": b""}
    for path in two_files(tmp_path / "in").iterdir():
        files[f"sample/10BT/{path.name}"] = path.read_bytes()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.head, server.commits = OLD, {OLD: files, NEW: {"README.md": README}}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def build(hub, folder, *args):
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0"}
    env |= {"HF_HOME": str(folder / "home"), "no_proxy": "*"}
    flags = ["--out", folder / "out", "--shard_size", 1000, "--workers", 1]
    return run("fineweb.py", *flags, *args, env=env, check=False)


def test_a_build_is_streamed_and_continues_with_its_commit(hub, tmp_path):
    second = hub.commits[OLD]["sample/10BT/001.parquet"]
    hub.commits[OLD]["sample/10BT/001.parquet"] = b"PAR1"  # so that the first build stops there
    assert "001.parquet" in refusal(build(hub, tmp_path, "--revision", "main"))
    hub.commits[OLD]["sample/10BT/001.parquet"] = second
    hub.head = NEW
    assert build(hub, tmp_path).returncode == 0
    assert tokens_of(tmp_path / "out") == reference(TEXTS, 1000)
    assert list_shards(tmp_path / "out", "train")[0].name == "edufineweb_train_000001.npy"
    assert json.loads((tmp_path / "out/manifest.json").read_text())["revision"] == OLD
    stored = [path.stat().st_size for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert max(stored) < 10_000  # no copy of the data


def test_what_cannot_be_downloaded_is_one_sentence(hub, tmp_path):
    sentence = refusal(build(hub, tmp_path, "--name", "sample-10TB"))
    assert REPO in sentence and "sample-10BT" in sentence
    sentence = refusal(run("fineweb.py", "--out", tmp_path / "out", check=False))  # offline
    assert f"{REPO} is not a local path" in sentence and "give a local path" in sentence
    assert not (tmp_path / "out").exists()
