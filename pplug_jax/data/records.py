"""Read the records of a JSON file one at a time, with their places to read each again.

A file is one list of records, or has a record a line (JSONL). It may be larger than the memory.
"""

import codecs
import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pplug_jax.errors import DataError

CHUNK = 1 << 20
BLANK = re.compile(r"[ \t\r\n\ufeff]*")  # a byte order mark is no content
# The benchmark's own script wraps LaMP-6's test questions as if they were outputs.
WRAPPED = re.compile(r'[ \t\r\n\ufeff]*{\s*"task"\s*:\s*"[^"]*"\s*,\s*"golds"\s*:\s*(?=\[)')
LONGEST_WRAPPER = 200  # characters
LONGEST_TOKEN = 12  # characters: an escaped surrogate pair


class Place(NamedTuple):
    """The place of a record.

    Attributes:
        path: its file.
        start: its first byte; in Parquet its row, counted from 0.
        size: its bytes; in Parquet 1 row.
        line: its line, counted from 1; in Parquet None.
    """

    path: Path
    start: int
    size: int
    line: int | None

    @property
    def where(self) -> str:
        return f"row {self.start + 1}" if self.line is None else f"line {self.line}"


def raise_bad(error: DataError) -> None:
    """Raise the error: what is done about a bad record by default."""
    raise error


def load(place: Place) -> Any:
    """Return the record at `place`."""
    with open(place.path, "rb") as file:
        file.seek(place.start)
        return json.loads(file.read(place.size).decode())


def records(
    path: Path, on_bad: Callable[[DataError], None] = raise_bad
) -> Iterator[tuple[Place, Any]]:
    """Return the records of a list or of lines, whichever the file has; a .jsonl file has lines.

    Args:
        path: the file.
        on_bad: called for a line that is not JSON, which is then left out. A list that is not JSON
            cannot be read beyond that place.

    Raises:
        DataError: no such file, not UTF-8, or a list that is not JSON.
    """
    with _text(path) as text:
        listed = path.suffix != ".jsonl" and text.skip() == "["
    return array(path) if listed else _lines(path, on_bad)


def _lines(path: Path, on_bad: Callable[[DataError], None]) -> Iterator[tuple[Place, Any]]:
    start = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            data = line
            while data.startswith(codecs.BOM_UTF8):  # of each of the files that were put together
                data = data.removeprefix(codecs.BOM_UTF8)
            place = Place(path, start + len(line) - len(data), len(data), number)
            start += len(line)
            try:
                if data.strip():
                    yield place, json.loads(data.decode().rstrip())
            except UnicodeDecodeError as error:
                problem = f"not UTF-8 at byte {error.start} of the line"
                on_bad(DataError(path, problem, place.where, number))
            except (ValueError, RecursionError) as error:
                on_bad(DataError(path, f"not JSON: {_said(error)}", place.where, number))


def _said(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


class _Text:
    """A moving window on a file's text.

    text[at:] was read and not yet taken; `start` is the byte, `line` and `column` (from 0) the
    place of text[at].
    """

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at = "", 0
        self.start, self.line, self.column = 0, 1, 0
        self.read = 0

    def more(self) -> bool:
        """Read as much again as the window holds, so that all attempts together stay linear."""
        data = self.file.read(max(CHUNK, len(self.text) - self.at))
        pending = len(self.decoder.getstate()[0])
        try:
            added = self.decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            byte = self.read - pending + error.start
            raise DataError(self.path, f"not UTF-8 at byte {byte}") from error
        if data:
            self.read += len(data)
            self.text, self.at = self.text[self.at :] + added, 0
        return bool(data)

    def take(self, end: int) -> None:
        """Move on to text[end]."""
        taken = self.text[self.at : end]
        self.start += len(taken.encode())
        newlines = taken.count("\n")
        self.line += newlines
        self.column = len(taken) - 1 - taken.rfind("\n") + (0 if newlines else self.column)
        self.at = end

    def skip(self) -> str:
        """Move over blanks; return the character there, or "" at the file's end."""
        while True:
            blank = BLANK.match(self.text, self.at)
            assert blank  # it may be of no length
            self.take(blank.end())
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def error(self, message: str) -> DataError:
        return DataError(
            self.path,
            f"not JSON: {message} at line {self.line}, column {self.column + 1}; "
            "if the file ends there, it was cut off in a download: fetch it again",
        )

    def value(self) -> Any:
        """Take the JSON value that begins here."""
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.at)
                # Of "1.5" cut behind the point only "1" would be seen.
                if end < len(self.text) - LONGEST_TOKEN or not self.more():
                    break
            except json.JSONDecodeError as error:
                # What the window cuts off looks wrong at its end; there, or where a string that
                # does not end begins.
                cut = error.msg.startswith("Unterminated")
                if not cut and error.pos < len(self.text) - LONGEST_TOKEN or not self.more():
                    self.take(error.pos)
                    raise self.error(error.msg) from error
            except (ValueError, RecursionError) as error:
                raise self.error(_said(error)) from error
        self.take(end)
        return value


@contextlib.contextmanager
def _text(path: Path) -> Iterator[_Text]:
    if not path.is_file():
        raise DataError(path, "no such file")
    with open(path, "rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise DataError(path, "the file is UTF-16; write it as UTF-8")
        file.seek(0)
        yield _Text(path, file)


def document(path: Path) -> Any:
    """Return the one JSON value that a file is.

    Raises:
        DataError: no such file, not UTF-8, or not JSON.
    """
    with _text(path) as text:
        text.skip()
        value = text.value()
        if text.skip():
            raise text.error("Extra data")
        return value


def array(path: Path) -> Iterator[tuple[Place, Any]]:
    """Yield the elements of the list that a JSON file is.

    Raises:
        DataError: no such file, not UTF-8, not JSON, or not a list.
    """
    with _text(path) as text:
        while len(text.text) < LONGEST_WRAPPER and text.more():
            pass
        wrapped = WRAPPED.match(text.text)
        if wrapped:
            text.take(wrapped.end())
        if text.skip() != "[":
            kind = type(text.value()).__name__
            raise DataError(path, f"expected a list of records, found {kind}")
        text.take(text.at + 1)
        while (character := text.skip()) != "]":
            start, line = text.start, text.line
            value = text.value()
            yield Place(path, start, text.start - start, line), value
            character = text.skip()
            if character == ",":
                text.take(text.at + 1)
                if text.skip() != "]":
                    continue
                raise text.error("Expecting value")
            if character != "]":
                raise text.error("Expecting ',' delimiter")
        text.take(text.at + 1)
        if wrapped and text.skip() == "}":
            text.take(text.at + 1)
        if text.skip():
            raise text.error("Extra data")
