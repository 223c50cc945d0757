"""Data sets of the Hugging Face hub, from a server on this machine that answers as the hub does, and from the cache."""

import dataclasses
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
from advice import sites
from conftest import ROOT
from test_excel import HEADER, ONE, PAIRS, TWO
from test_formats_fuzz import as_parquet
from test_layouts import jsonl, quoted

from jlora.config.schema import Config
from jlora.data.readers import hub
from jlora.training import resume

OLD, NEW = "a" * 40, "b" * 40
ROWS = jsonl(*({"question": q, "answer": a} for q, a in (ONE, TWO))).encode()
SETS = {  # name -> commit -> files
    "owner/laws": {
        OLD: {"README.md": b"Laws.", "data/train-00000-of-00001.parquet": as_parquet([ONE])},
        NEW: {
            "README.md": b"Laws.",
            "dataset_infos.json": b"{}",
            "data/train-00000-of-00002.parquet": as_parquet([ONE]),
            "data/train-00001-of-00002.parquet": as_parquet([TWO]),
            "data/test-00000-of-00001.parquet": as_parquet([TWO]),
        },
    },
    "owner/one": {NEW: {"laws.jsonl": ROWS, ".gitattributes": b"x"}},
    "owner/once": {NEW: {"laws.jsonl": ROWS}},
    "owner/several": {
        NEW: {
            "zh/train.csv": quoted(",", HEADER, ONE).encode(),
            "en/train.jsonl.gz": gzip.compress(ROWS),
            "en/test.jsonl": ROWS,
            "train.csv": quoted(",", HEADER, TWO).encode(),
            "train.jsonl": ROWS,
            "default/dev/0000.parquet": as_parquet([ONE]),
            "default/dev/0001.parquet": as_parquet([TWO]),
        }
    },
    "owner/half": {NEW: {"train-00000-of-00002.jsonl": ROWS}},
    "owner/code": {NEW: {"laws.py": b"print()"}, OLD: {"default/train/0000.parquet": as_parquet([ONE, TWO])}},
}
GATED = "owner/gated"
READ = """
import json, sys
from jlora.common.errors import UserError
from jlora.data.readers import files
for path in sys.argv[1:]:
    said = []
    try:
        rows = files.read_conversations(path, "train_data_dir", log=said.append)
        made = {
            "rows": [[message.content for message in row.messages] for row in rows],
            "places": [row.where for row in rows],
            "hash": files.hash_files(path, "train_data_dir"),
            "commit": files.hub_commit(path, "train_data_dir"),
            "path": files.resolved_path(path, "train_data_dir"),
        }
    except UserError as error:
        made = {"error": str(error)}
    print(json.dumps({**made, "said": said}))
"""


class Hub(BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks: the commit of a revision, the files of a commit, and each file."""

    def do_GET(self):
        kind, _, rest = unquote(urlsplit(self.path).path).removeprefix("/").partition("datasets/")
        rest = f"{rest}/revision/main" if rest.count("/") == 1 else rest  # of the default branch
        owner, name, action, *others = rest.split("/")
        data_set = f"{owner}/{name}"
        if data_set == GATED:
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if data_set not in SETS:
            return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        revision = "/".join(others[:3]) if others[0] == "refs" else others[0]
        commit = {"main": NEW, "v1": OLD, "refs/convert/parquet": OLD}.get(revision, revision)
        if commit not in SETS[data_set]:
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        content = SETS[data_set][commit]
        if kind == "api/" and action == "revision":
            siblings = [{"rfilename": name} for name in content]
            return self.answer(200, json.dumps({"id": data_set, "sha": commit, "siblings": siblings}).encode())
        if kind == "api/" and action == "tree":
            tree = [
                {"type": "file", "path": name, "size": len(text), "oid": hashlib.sha1(text).hexdigest()}
                for name, text in content.items()
            ]
            return self.answer(200, json.dumps(tree).encode())
        text = content["/".join(others[len(revision.split("/")) :])]
        return self.answer(200, text, {"ETag": f'"{hashlib.sha1(text).hexdigest()}"', "X-Repo-Commit": commit})

    do_HEAD = do_GET

    def answer(self, status, content, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Returns a function that reads paths in a process of their own, with the hub's cache and perhaps the hub."""
    cache = tmp_path_factory.mktemp("hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def read(*paths, hub="here"):
        port = server.server_port if hub == "here" else 9  # where nothing answers
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{port}",
            "HF_HUB_OFFLINE": str(int(hub == "offline")),
            "HF_HUB_CACHE": str(cache),
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        command = [sys.executable, "-c", READ, *paths]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    yield read
    server.shutdown()


@pytest.fixture(scope="module")
def downloaded(outcomes):
    """Data sets that were read while the hub answered."""
    paths = ["hf:owner/laws/train", "hf:owner/laws@v1/train", f"hf:owner/laws@{OLD}/train", "hf:owner/one"]
    return dict(zip(paths, outcomes(*paths), strict=True))


def test_a_split_is_downloaded_and_read(downloaded):
    made = downloaded["hf:owner/laws/train"]
    assert made["rows"] == PAIRS and made["said"] == []
    assert made["places"] == [f"hf:owner/laws/data/train-0000{i}-of-00002.parquet:1" for i in (0, 1)]
    assert made["commit"] == NEW and made["path"] == f"hf:owner/laws@{NEW}/train"
    assert downloaded["hf:owner/one"]["rows"] == PAIRS  # its only split


def test_a_revision_is_a_tag_a_branch_or_a_commit(downloaded, outcomes):
    for revision in ("v1", OLD):
        made = downloaded[f"hf:owner/laws@{revision}/train"]
        assert made["rows"] == [[*ONE]] and made["commit"] == OLD
        assert made["hash"] != downloaded["hf:owner/laws/train"]["hash"]
    (made,) = outcomes("hf:owner/laws@refs/convert/parquet/train")
    assert made["rows"] == [[*ONE]]


@pytest.mark.parametrize("hub", ["offline", "away"])
def test_the_cache_is_read_without_the_hub(downloaded, outcomes, hub):
    again = outcomes(*downloaded, "hf:owner/laws/test", "hf:owner/half/train", hub=hub)
    for (path, before), made in zip(downloaded.items(), again, strict=False):
        said = f"train_data_dir: read from the hub's cache, because the hub could not be asked: {made['path']}"
        assert {**made, "said": []} == before and made["said"] == [said], path
    assert "Expected hf:owner/laws/SPLIT, where SPLIT is one of train." in again[-2]["error"]  # test is not there
    reason = "HF_HUB_OFFLINE is set. Download it once" if hub == "offline" else "Check the network and HF_ENDPOINT"
    assert "owner/half is not in " in again[-1]["error"] and reason in again[-1]["error"]


def test_splits_in_directories_and_single_files(outcomes):
    paths = ["zh/train", "en/train", "default/dev", "train.csv", "en/test.jsonl"]
    made = outcomes(*(f"hf:owner/several/{path}" for path in paths))
    assert [each["rows"] for each in made] == [[[*ONE]], PAIRS, PAIRS, [[*TWO]], PAIRS]
    assert made[1]["places"][0] == "hf:owner/several/en/train.jsonl.gz:1"


ERRORS = {
    "hf:owner/laws": "hf:owner/laws: Expected hf:owner/laws/SPLIT, where SPLIT is one of test, train.",
    "hf:owner/laws@v1/dev": "Expected hf:owner/laws@v1/SPLIT, where SPLIT is one of train.",
    "hf:owner/laws@v9/train": "owner/laws has no revision 'v9' on the hub. Name one of its branches, tags or commits.",
    "hf:owner/several/train": "Several files could be train. Name one of them, as in hf:owner/several/train.csv: "
    "train.csv, train.jsonl.",
    "hf:owner/none/train": "The hub has no data set owner/none, or it is private. Check the name, or log in with",
    f"hf:{GATED}/train": "owner/gated is gated. Accept its terms on https://huggingface.co/datasets/owner/gated, and",
    "hf:owner/half/train": "Only 1 of the 2 files of train are on the hub. Name one of them, as in "
    "hf:owner/half/train-00000-of-00002.jsonl.",
    "hf:owner/code/train": "The data set has no Parquet, JSON or CSV files. If the hub has converted it, set "
    "hf:owner/code@refs/convert/parquet.",
    "hf:laws": "Expected hf:OWNER/NAME/SPLIT or hf:OWNER/NAME@REVISION/SPLIT.",
    "hf:own er/laws/train": "'own er/laws' is not a valid name on the hub. Expected OWNER/NAME.",
}


def test_errors_are_plain(outcomes):
    for (path, message), made in zip(ERRORS.items(), outcomes(*ERRORS), strict=True):
        assert made["error"].startswith(f"train_data_dir={path}: ") and message in made["error"], made


ADVICE = {  # path -> what its error advises
    "hf:owner/laws": "hf:owner/laws/train",
    "hf:owner/laws@v9/train": "hf:owner/laws@v1/train",
    "hf:owner/several/train": "hf:owner/several/train.csv",
    "hf:owner/none/train": "hf:owner/one/laws",
    "hf:owner/half/train": "hf:owner/half/train-00000-of-00002.jsonl",
    "hf:owner/code/train": "hf:owner/code@refs/convert/parquet",
    "hf:laws": "hf:owner/laws/train",
    "hf:own er/laws/train": "hf:owner/laws/train",
}


def test_advice_is_followed(outcomes):
    assert ERRORS.keys() - ADVICE.keys() == {f"hf:{GATED}/train", "hf:owner/laws@v1/dev"}  # terms; as the first
    for path, made in zip(ADVICE.values(), outcomes(*ADVICE.values()), strict=True):
        assert made.get("rows"), (path, made)
    missing, once, again = (outcomes("hf:owner/once", hub=where)[0] for where in ("offline", "here", "offline"))
    assert "Download it once without HF_HUB_OFFLINE" in missing["error"] and once["rows"] == again["rows"] == PAIRS


def test_every_message_about_the_hub_has_an_error():
    """The longest words of a message that are not filled in must be in an error."""
    shown = " ".join(ERRORS.values())
    for code in sites(["data/readers/hub.py"]).values():
        assert max(re.split(r"\{[^}]*\}", code[12:-2]), key=len).strip(" :.") in shown


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("data/train-00000-of-00010.parquet", "train"),
        ("data/train-00000-of-00010-0123456789abcdef.parquet", "train"),
        ("main/test-00000-of-00001.parquet", "main/test"),
        ("default/train/0000.parquet", "default/train"),
        ("train_sft.json.gz", "train_sft"),
        ("0000.parquet", "0000"),
        ("README.md", ""),
        ("dataset_infos.json", ""),
        (".cache/train.csv", ""),
        ("train.py", ""),
    ],
)
def test_splits_by_the_names_of_files(name, split):
    assert hub._split_of(name) == split


def test_a_resumed_run_names_the_commit_it_was_trained_on():
    kept = {"runtime": {"compute_dtype": "float32"}, "base": {"fingerprint": "x", "commit": ""}}
    configs = {"config": dict.fromkeys(dataclasses.asdict(Config()))}
    old, new = ({**kept, **configs, "data": {"train": name, "train_commit": name * 40}} for name in "ab")
    assert resume.describe_changes(old, new) == {"train": f"the training data changed (it was commit {OLD} on the hub)"}
    for record in (old, new):
        del record["data"]["train_commit"]  # as older versions wrote it
    assert resume.describe_changes(old, new) == {"train": "the training data changed"}
