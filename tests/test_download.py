"""Downloads from a server on this machine that breaks off, changes its files, answers wrongly."""

import dataclasses
import http.server
import json
import re
import socket
import struct
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pplug_jax.data import download as module
from pplug_jax.data.download import BASE_URL, CHUNK, download, file_urls
from pplug_jax.errors import InputError
from pplug_jax.runtime.console import Progress

NAME = "test_questions.json"
PAGE = b"\n<!doctype html><html><body>Not here</body></html>"


def body(items: int, letter: str = "a") -> bytes:
    """About 100 * items bytes of JSON among blanks."""
    text = json.dumps([{"id": str(n), "input": letter * 80} for n in range(items)])
    return f" \n{text}\n".encode()


@dataclasses.dataclass
class Server:
    """What is served, and what was asked for.

    cuts: after how many bytes each coming answer breaks off, -1 with a reset before its headers.
    headers: what tells one version of a file from another.
    """

    url: str = ""
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    headers: dict[str, str] = dataclasses.field(default_factory=lambda: {"ETag": '"1"'})
    cuts: list[int] = dataclasses.field(default_factory=list)
    status: int = 200
    with_ranges: bool = True
    with_if_range: bool = True
    with_length: bool = True
    stalls: bool = False
    requests: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)
    served: int = 0
    released: threading.Event = dataclasses.field(default_factory=threading.Event)

    @property
    def ranges(self) -> list[str | None]:
        return [asked for _, asked in self.requests]


def handler(server: Server) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers["Range"]
            server.requests.append((self.path, asked))
            cut = server.cuts.pop(0) if server.cuts else None
            if cut == -1:
                reset = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                self.rfile.close()
                self.wfile.close()
                self.connection.close()
                return
            data = server.files.get(self.path)
            if server.status != 200 or data is None:
                self.send_error(server.status if server.status != 200 else 404)
                return
            unchanged = self.headers["If-Range"] in server.headers.values()
            if asked and server.with_ranges and (unchanged or not server.with_if_range):
                start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
                if start >= len(data):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            else:
                start = 0
                self.send_response(200)
            if server.with_length:
                self.send_header("Content-Length", str(len(data) - start))
            for name, value in server.headers.items():
                self.send_header(name, value)
            self.end_headers()
            rest = data[start:] if cut is None else data[start : start + cut]
            server.served += len(rest)
            self.wfile.write(rest)
            if cut is not None and server.stalls:
                self.wfile.flush()
                server.released.wait()

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "WAIT", 0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(urllib.request, "_opener", None)  # it would keep earlier proxies
    state = Server()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(state)) as served:
        state.url = f"http://127.0.0.1:{served.server_port}/LaMP"
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        state.released.set()
        served.shutdown()
        thread.join()


def put(server: Server, data: bytes, name: str = NAME, task: str = "LaMP_4") -> None:
    server.files[f"/LaMP/time/{task}/{name.partition('_')[0]}/{name}"] = data


def fetch(server: Server, directory: Path, *splits: str) -> list[Path]:
    splits = splits or ("test",)
    return download("LaMP_4", splits, directory, time_based=True, base_url=server.url)


def error(server: Server, directory: Path, *splits: str) -> str:
    with pytest.raises(InputError) as caught:
        fetch(server, directory, *splits)
    return str(caught.value)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("task", [f"LaMP_{n}" for n in range(1, 8)])
@pytest.mark.parametrize("time_based", [False, True])
@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_where_the_files_are(task: str, time_based: bool, split: str):
    folder = f"{BASE_URL}{'/time' * time_based}/{task}{'/new' * (task == 'LaMP_2')}/{split}"
    expected = {f"{split}_questions.json": f"{folder}/{split}_questions.json"}
    if split != "test":
        expected[f"{split}_outputs.json"] = f"{folder}/{split}_outputs.json"
    assert file_urls(task, split, time_based=time_based) == expected


def test_the_addresses_are_as_published():
    assert [*file_urls("LaMP_2", "dev", time_based=True).values()] == [
        "https://ciir.cs.umass.edu/downloads/LaMP/time/LaMP_2/new/dev/dev_questions.json",
        "https://ciir.cs.umass.edu/downloads/LaMP/time/LaMP_2/new/dev/dev_outputs.json",
    ]
    assert file_urls("LaMP_4", "test", time_based=False, base_url="http://mirror/") == {
        NAME: "http://mirror/LaMP_4/test/test_questions.json"
    }


def test_the_files_of_several_splits(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = {
        name: body(n) for n, name in enumerate(["dev_questions.json", "dev_outputs.json", NAME])
    }
    for name, text in data.items():
        put(server, text, name)
    directory = tmp_path / "data" / "LaMP_4"
    paths = fetch(server, directory, "dev", "test")
    assert paths == [directory / name for name in data]
    assert {path.name: path.read_bytes() for path in paths} == data
    assert names(directory) == sorted(data)
    assert "dev_questions.json: 1/1 MB, done" in capsys.readouterr().out


def test_what_is_there_is_not_asked_for(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / NAME).write_bytes(b"[]")
    assert fetch(server, tmp_path) == [tmp_path / NAME]
    assert server.requests == []
    assert f"{tmp_path / NAME} is already there" in capsys.readouterr().out


def test_broken_connections_are_continued(server: Server, tmp_path: Path):
    data = body(3000)
    put(server, data)
    server.cuts = [CHUNK + 5, -1, 0, 17, 0, -1, 2 * CHUNK, 0]
    assert fetch(server, tmp_path)[0].read_bytes() == data
    assert server.served == len(data)
    at = [CHUNK + 5, CHUNK + 5, CHUNK + 5, CHUNK + 22, CHUNK + 22, CHUNK + 22, 3 * CHUNK + 22]
    assert server.ranges == [None, *(f"bytes={n}-" for n in [*at, at[-1]])]
    assert names(tmp_path) == [NAME]


@pytest.mark.parametrize("with_length", [True, False])
def test_a_silent_server_is_asked_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_length: bool
):
    monkeypatch.setattr(module, "TIMEOUT", 0.5)
    data = body(1000)
    put(server, data)
    server.cuts, server.stalls, server.with_length = [CHUNK], True, with_length
    assert fetch(server, tmp_path)[0].read_bytes() == data
    assert server.ranges == [None, f"bytes={CHUNK}-" if with_length else None]


def test_a_later_call_goes_on(server: Server, tmp_path: Path):
    data = body(2000)
    put(server, data)
    server.cuts = [CHUNK] + [0] * 5
    said = error(server, tmp_path)
    assert f"{CHUNK:,} bytes in {tmp_path / NAME}.partial" in said
    assert "the same command goes on" in said
    assert len(server.requests) == 6
    assert not (tmp_path / NAME).exists()
    assert fetch(server, tmp_path)[0].read_bytes() == data
    assert server.served == len(data)
    assert server.ranges[-1] == f"bytes={CHUNK}-"


def test_after_an_interruption_the_same_call_goes_on(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(self: Progress, count: int, info: str = "") -> None:
        raise KeyboardInterrupt

    data = body(2000)
    put(server, data)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Progress, "advance", interrupt)
        fetch(server, tmp_path)
    assert names(tmp_path) == [f"{NAME}.partial", f"{NAME}.partial.etag"]
    assert fetch(server, tmp_path)[0].read_bytes() == data
    assert server.ranges == [None, f"bytes={CHUNK}-"]


def test_interrupted_before_the_renaming(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(file: int) -> None:
        raise KeyboardInterrupt

    put(server, body(10))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module.os, "fsync", interrupt)
        fetch(server, tmp_path)
    assert fetch(server, tmp_path)[0].read_bytes() == body(10)
    assert len(server.requests) == 1


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path):
    data = body(1000)
    put(server, data)
    server.with_ranges = False
    server.cuts = [20_000, 50_000]
    assert fetch(server, tmp_path)[0].read_bytes() == data
    assert server.served == 70_000 + len(data)


def test_no_further_than_before_is_no_progress(server: Server, tmp_path: Path):
    # Otherwise a server without ranges that always breaks off would be asked for ever.
    put(server, body(1000))
    server.with_ranges = False
    server.cuts = [20_000, 10_000] * 50
    assert "5 attempts in a row failed" in error(server, tmp_path)
    assert len(server.requests) == 6


DATES = [{"Last-Modified": f"Mon, 0{n} Jan 2024 00:00:00 GMT"} for n in (1, 2)]
VERSIONS = {
    "etag": ({"ETag": '"1"'}, {"ETag": '"2"'}),
    "date": DATES,
    "weak etag and date": [{"ETag": 'W/"1"', **date} for date in DATES],
}


@pytest.mark.parametrize("length", [900, 1000, 1100])
@pytest.mark.parametrize("with_if_range", [True, False])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_file_that_changed_is_never_mixed(
    server: Server, tmp_path: Path, version: str, with_if_range: bool, length: int
):
    server.with_if_range = with_if_range
    server.headers, changed = VERSIONS[version]
    put(server, body(1000, "a"))
    server.cuts = [40_000] + [0] * 5
    error(server, tmp_path)
    server.headers = changed
    put(server, body(length, "b"))
    server.cuts = [50_000]
    assert fetch(server, tmp_path)[0].read_bytes() == body(length, "b")


@pytest.mark.parametrize("length", [900, 1100])
def test_another_length_under_the_same_etag_starts_over(
    server: Server, tmp_path: Path, length: int
):
    put(server, body(1000, "a"))
    server.cuts = [40_000] + [0] * 5
    error(server, tmp_path)
    put(server, body(length, "b"))
    assert fetch(server, tmp_path)[0].read_bytes() == body(length, "b")
    assert server.ranges[-2:] == ["bytes=40000-", None]


def test_without_etag_and_date_nothing_is_continued(server: Server, tmp_path: Path):
    server.headers = {}
    put(server, body(1000))
    server.cuts = [40_000]
    assert fetch(server, tmp_path)[0].read_bytes() == body(1000)
    assert server.ranges == [None, None]


@pytest.mark.parametrize("sidecar", ['"1"\n999999', '"1"', "", None])
def test_a_partial_longer_than_the_file_starts_over(
    server: Server, tmp_path: Path, sidecar: str | None
):
    put(server, body(10))
    (tmp_path / f"{NAME}.partial").write_bytes(body(100))
    if sidecar is not None:
        (tmp_path / f"{NAME}.partial.etag").write_text(sidecar)
    assert fetch(server, tmp_path)[0].read_bytes() == body(10)
    assert names(tmp_path) == [NAME]


def test_an_answer_without_a_length(server: Server, tmp_path: Path):
    put(server, body(1000))
    server.with_length = False
    assert fetch(server, tmp_path)[0].read_bytes() == body(1000)
    server.cuts = [40_000]
    (tmp_path / NAME).unlink()
    assert "does not end as JSON does" in error(server, tmp_path)


def test_a_web_page_is_not_data(server: Server, tmp_path: Path):
    put(server, PAGE)
    said = error(server, tmp_path)
    assert f"{server.url}/time/LaMP_4/test/{NAME}: the answer is not data" in said
    assert "web page" in said
    assert "<!doctype html>" in said
    assert names(tmp_path) == []
    assert len(server.requests) == 1


def test_a_web_page_in_between_costs_nothing(server: Server, tmp_path: Path):
    data = body(1000)
    put(server, data)
    server.cuts = [CHUNK] + [0] * 5
    error(server, tmp_path)
    server.with_ranges = False
    put(server, PAGE)
    assert "web page" in error(server, tmp_path)
    server.with_ranges = True
    put(server, data)
    assert fetch(server, tmp_path)[0].read_bytes() == data
    assert server.ranges[-1] == f"bytes={CHUNK}-"


@pytest.mark.parametrize("status", [404, 403, 407])
def test_a_refusal_is_final(server: Server, tmp_path: Path, status: int):
    put(server, body(1))
    server.status = status
    said = error(server, tmp_path)
    url = f"{server.url}/time/LaMP_4/test/{NAME}"
    assert f"{url}: HTTP {status}" in said
    assert f"  {url} -> {tmp_path / NAME}" in said
    assert len(server.requests) == 1


def test_a_server_in_trouble_is_asked_again(server: Server, tmp_path: Path):
    server.status = 503
    assert "HTTP 503 Service Unavailable; 5 attempts" in error(server, tmp_path)
    assert len(server.requests) == 5


@pytest.mark.parametrize("data", [body(1000)[:-40], b"", b'[{"id": "1"}]\n<p>gateway timeout</p>'])
def test_a_file_cut_on_the_server_is_deleted(server: Server, tmp_path: Path, data: bytes):
    put(server, data)
    said = error(server, tmp_path)
    assert f"{NAME} from {server.url}" in said
    assert "does not end as JSON does" in said
    assert names(tmp_path) == []
    put(server, body(3))
    assert fetch(server, tmp_path)[0].read_bytes() == body(3)


def test_without_a_way_the_message_says_what_to_fetch_and_where_to_put_it(
    server: Server, tmp_path: Path
):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        server.url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        (tmp_path / "dev_outputs.json").write_bytes(b"{}")
        said = error(server, tmp_path, "train", "dev")
    assert "Connection refused; 5 attempts" in said
    assert said.splitlines()[2:] == [
        f"  {server.url}/time/LaMP_4/{name.partition('_')[0]}/{name} -> {tmp_path / name}"
        for name in ("train_questions.json", "train_outputs.json", "dev_questions.json")
    ]


def test_a_proxy_that_refuses(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, server.url)
    server.status, server.url = 403, "http://lamp.invalid"
    assert "http://lamp.invalid/time/LaMP_4/test/test_questions.json: HTTP 403" in error(
        server, tmp_path
    )
    server.url = "https://lamp.invalid"  # the server here knows no CONNECT
    assert "Tunnel connection failed" in error(server, tmp_path)


@pytest.mark.parametrize("base_url", ["no url", "http://127.0.0.1:port"])
def test_no_url(server: Server, tmp_path: Path, base_url: str):
    server.url = base_url
    assert f"{base_url}/time/LaMP_4/test/{NAME}" in error(server, tmp_path)


def test_a_full_disk(server: Server, tmp_path: Path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    put(server, body(1000))
    (tmp_path / f"{NAME}.partial").symlink_to("/dev/full")
    said = error(server, tmp_path)
    assert f"{tmp_path / NAME} cannot be written" in said
    assert "No space left on device" in said


def test_a_directory_that_is_a_file(server: Server, tmp_path: Path):
    (tmp_path / "file").touch()
    assert "cannot be written" in error(server, tmp_path / "file")


def test_the_emails_are_not_public(server: Server, tmp_path: Path):
    with pytest.raises(InputError) as caught:
        download("LaMP_6", ["dev"], tmp_path, time_based=False, base_url=server.url)
    said = str(caught.value)
    assert "LDC2015T03" in said
    assert "create_avocado_dataset.py" in said
    for split in ("train", "dev", "test"):
        assert f"{server.url}/LaMP_6/{split}/{split}_questions.json" in said
    assert said.endswith(str(tmp_path))
    assert server.requests == []


@pytest.mark.parametrize("task", ["product_review_writing", "LaMP_QA", "custom", "LaMP_8"])
def test_other_benchmarks_are_elsewhere(server: Server, tmp_path: Path, task: str):
    with pytest.raises(InputError) as caught:
        download(task, ["dev"], tmp_path, time_based=False, base_url=server.url)
    for part in (repr(task), "LongLaMP/LongLaMP", "alireza7/LaMP-QA", "docs/data.md"):
        assert part in str(caught.value)
    assert server.requests == []
