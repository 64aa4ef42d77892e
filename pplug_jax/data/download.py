"""Fetch the public LaMP files whole: continue broken downloads, check them, then name them."""

import contextlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from pplug_jax.errors import InputError
from pplug_jax.runtime.console import Progress, say
from pplug_jax.settings import BASE_URL

CHUNK = 1 << 16  # what a lost connection can cost
TIMEOUT = 60  # seconds without a byte
ATTEMPTS = 5  # in a row, none of which got further than those before
WAIT = 0.5  # seconds to the next attempt, doubled with each in that row


class _Broken(Exception):
    """This attempt failed; another may go on with what it left."""


def file_urls(
    task: str, split: str, *, time_based: bool, base_url: str = BASE_URL
) -> dict[str, str]:
    """Return the names of a split's files, and their URLs; the test outputs are withheld.

    The layout is that of https://lamp-benchmark.github.io/download: LaMP_2 alone is the retired
    news task, the movies are its `new`.
    """
    folders = [
        base_url.rstrip("/"),
        *(["time"] if time_based else []),
        task,
        *(["new"] if task == "LaMP_2" else []),
        split,
    ]
    kinds = ["questions"] if split == "test" else ["questions", "outputs"]
    names = [f"{split}_{kind}.json" for kind in kinds]
    return {name: "/".join([*folders, name]) for name in names}


def download(
    task: str,
    splits: Sequence[str],
    directory: Path,
    *,
    time_based: bool,
    base_url: str = BASE_URL,
) -> list[Path]:
    """Bring the files of `splits` into `directory`, and return their paths.

    A file that is there is whole, and is not fetched again. What an earlier call left of one, in
    FILE.partial, is continued.

    Args:
        task: the task's name.
        splits: the splits.
        directory: where the files go.
        time_based: LaMP split by time; otherwise by user.
        base_url: the server.

    Raises:
        InputError: the task is not served; the server cannot be reached or has no such file, or a
            web page in its place; the file is cut off on the server; the directory cannot be
            written. The message says what to fetch by other means, and where to put it.
    """

    def urls(split: str) -> dict[str, str]:
        return file_urls(task, split, time_based=time_based, base_url=base_url)

    if task == "LaMP_6":
        ids = [urls(split)[f"{split}_questions.json"] for split in ("train", "dev", "test")]
        raise InputError(
            "LaMP_6 is not public: its e-mails need the Avocado licence (LDC2015T03); with them, "
            "the benchmark's own script data/avocado/create_avocado_dataset.py "
            "(https://github.com/LaMP-Benchmark/LaMP) builds {train,dev,test}_questions.json, and "
            f"the outputs, from the id files {', '.join(ids)}; put what it builds into {directory}"
        )
    if not re.fullmatch("LaMP_[1-7]", task):
        raise InputError(
            f"only LaMP_1 to LaMP_7 can be downloaded here, not {task!r}; LongLaMP is the Hugging "
            "Face data set LongLaMP/LongLaMP, LaMP-QA is alireza7/LaMP-QA: docs/data.md has the "
            f"commands; data of your own belongs into {directory}"
        )
    wanted = {directory / name: url for split in splits for name, url in urls(split).items()}
    for path, url in wanted.items():
        if path.is_file():
            say(f"{path} is already there")
            continue
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _fetch(url, path)
        except OSError as error:  # those of the network are InputErrors by now
            raise InputError(
                f"{path} cannot be written: {error}; "
                "once it can, the same command goes on with what is there"
            ) from error
        except InputError as error:
            missing = [f"  {u} -> {p}" for p, u in wanted.items() if not p.is_file()]
            raise InputError(
                f"{error}\nWhat is missing can also be fetched by other means and put here:\n"
                + "\n".join(missing)
            ) from error
    return list(wanted)


def _fetch(url: str, path: Path) -> None:
    partial, version = Path(f"{path}.partial"), Path(f"{path}.partial.etag")
    furthest, failures = _size(partial), 0
    while True:
        try:
            _receive(url, partial, version, path.name)
            break
        except _Broken as error:
            size = _size(partial)
            failures = 0 if size > furthest else failures + 1
            furthest = max(furthest, size)
            if failures == ATTEMPTS:
                left = f"; the same command goes on from the {size:,} bytes in {partial}"
                raise InputError(
                    f"{url}: {error}; {ATTEMPTS} attempts in a row failed{left if size else ''}"
                ) from error
            say(f"{path.name}: {error}; trying again")
            time.sleep(WAIT * 2**failures)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
        file.seek(max(0, _size(partial) - CHUNK))
        whole = file.read().rstrip().endswith((b"]", b"}"))
    if not whole:
        _discard(partial, version)
        raise InputError(
            f"{path.name} from {url} does not end as JSON does, although all of it came; it is "
            "deleted, and the same command fetches it afresh"
        )
    partial.rename(path)
    version.unlink()


def _receive(url: str, partial: Path, version: Path, title: str) -> None:
    """Try once to bring `partial` to its whole length.

    `version` holds the ETag (or the date) and the length of the file that `partial` begins.
    """
    have = _size(partial)
    known = version.read_text("latin-1") if version.is_file() else ""
    tag, _, total = known.partition("\n")
    headers = {}
    if have and tag and total:
        if str(have) == total:  # ended between the last byte and the renaming
            return
        headers = {"Range": f"bytes={have}-", "If-Range": tag}
    with _network(url):
        try:
            response = urllib.request.urlopen(
                urllib.request.Request(url, headers=headers), timeout=TIMEOUT
            )
        except urllib.error.HTTPError as error:
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                _discard(partial, version)
            raise
    with response:
        if response.status == http.client.PARTIAL_CONTENT:
            # Servers that pass over If-Range would have us mix two files.
            expected = f"bytes {have}-{int(total) - 1}/{total}"
            if response.headers["Content-Range"] != expected or _tag(response) not in (tag, ""):
                _discard(partial, version)
                raise _Broken("the file has changed on the server, starting over")
        else:
            # The benchmark's server answers a wrong path with a page and HTTP status 200. What is
            # there already stays: a hotel's log-in page says nothing against it.
            with _network(url):
                start = response.peek(CHUNK).lstrip()[:40]
            if start and not start.startswith((b"[", b"{")):
                raise InputError(
                    f"{url}: the answer is not data but seems to be a web page; it begins {start!r}"
                )
            have, total = 0, response.headers["Content-Length"] or ""
            partial.write_bytes(b"")
            version.write_text(f"{_tag(response)}\n{total}", "latin-1")
        megabytes = _megabytes(int(total or 0))
        with (
            partial.open("ab") as file,
            Progress(title, megabytes, "MB", done=_megabytes(have)) as progress,
        ):
            while True:
                with _network(url):
                    chunk = response.read(CHUNK)
                if not chunk:
                    break
                file.write(chunk)
                have += len(chunk)
                progress.advance(_megabytes(have) - progress.done)
            if total and have != int(total):
                raise _Broken(f"the connection ended after {have:,} of {int(total):,} bytes")


@contextlib.contextmanager
def _network(url: str) -> Iterator[None]:
    """Tell the network's errors, which time may or may not mend, from the disk's."""
    try:
        yield
    except urllib.error.HTTPError as error:
        problem = f"HTTP {error.code} {error.reason}"
        if error.code < 500 and error.code not in (408, 416, 429):
            raise InputError(f"{url}: {problem}") from error
        raise _Broken(problem) from error
    except (OSError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", None) or error  # what urllib wraps
        raise _Broken(str(cause) or repr(cause)) from error
    except ValueError as error:
        raise InputError(f"{url}: {error}") from error


def _tag(response: http.client.HTTPResponse) -> str:
    """Return what changes with the file; a weak ETag does not promise the same bytes."""
    etag = response.headers["ETag"] or ""
    return etag if etag.startswith('"') else response.headers["Last-Modified"] or ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _megabytes(size: int) -> int:
    return -(-size // 10**6)  # a small file is one, not none


def _discard(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
