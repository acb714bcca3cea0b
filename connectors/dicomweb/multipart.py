"""Reads a multipart/related stream as it arrives, whatever its size and wherever its chunks break.

Source: RFC 2046 section 5.1.1 (delimiter, preamble, epilogue), RFC 2387 (multipart/related), DICOM PS3.18 8.6.
The body of a part is handed on in pieces and never collected, so memory stays at one chunk plus one delimiter.
"""

import re
from collections.abc import Mapping
from email.message import Message
from typing import Protocol

from connectors.errors import Permanent, Retryable

MAX_HEADER_BYTES = 16 * 1024
MAX_PREAMBLE_BYTES = 64 * 1024
MAX_PADDING_BYTES = 256
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,\-./:=? ]{0,199}[0-9A-Za-z'()+_,\-./:=?]")
_NO_HEADERS = re.compile(rb"\r?\n")
_BLANK_LINE = re.compile(rb"\r?\n\r?\n")
_BINARY_ENCODINGS = ("", "binary", "8bit", "7bit")


class PartSink(Protocol):
    """Takes what the reader finds, in order: begin, data (any number of times), end."""

    def begin(self, headers: Mapping[str, str]) -> None:
        """A part starts; header names are lower case."""

    def data(self, piece: memoryview) -> None:
        """The next bytes of the part; they never change, so the view may be kept."""

    def end(self) -> None:
        """The part is complete: the delimiter after it was seen."""


def boundary_of(content_type: str, where: str) -> bytes:
    """The boundary that a Content-Type header names, quoted or not. `where` names the server in errors."""
    message = Message()
    message["content-type"] = content_type
    if message.get_content_maintype() != "multipart" or not content_type:
        raise Permanent(
            f"{where}: answered {content_type.split(';')[0] or 'no Content-Type'!r} instead of multipart/related. "
            "Check that url is the DICOMweb root of a server that offers WADO-RS."
        )
    boundary = message.get_param("boundary")
    if not isinstance(boundary, str) or not _BOUNDARY.fullmatch(boundary):
        raise Permanent(f"{where}: multipart answer without a usable boundary. Its maker must repair the server.")
    return boundary.encode("ascii")


class MultipartReader:
    """Push parser: `feed` every chunk, then `close`; parts go to the sink as they arrive.

    Raises Permanent where the stream breaks the format, Retryable from `close` where it stops too early.
    """

    def __init__(self, boundary: bytes, sink: PartSink, *, where: str) -> None:
        self._dash_boundary = b"--" + boundary
        self._delimiter = b"\r\n" + self._dash_boundary
        self._sink = sink
        self._where = where
        # A boundary stands at the start of a line, and the stream starts one.
        self._held = b"\n"
        self._step = self._preamble
        self._left: int | None = None
        self._preamble_bytes = 0
        self.parts = 0
        self.finished = False

    def feed(self, chunk: bytes) -> None:
        """Takes the next bytes of the body; bytes after the closing delimiter (epilogue) are dropped."""
        data = self._held + chunk if self._held else chunk
        position = 0
        while not self.finished:
            following = self._step(data, position)
            if following is None:
                break
            position = following
        self._held = b"" if self.finished else data[self._keep_from :]

    def close(self) -> None:
        """Checks that the closing delimiter came: only then is the study whole."""
        if not self.finished:
            raise Retryable(
                f"{self._where}: the multipart answer stopped before its closing boundary, "
                f"after {self.parts} whole parts. Nothing was kept; fetch it again."
            )

    # Every step takes (data, position), and gives the position behind what it used; None asks for more data
    # and leaves in _keep_from the first byte that must be seen again.
    _keep_from = 0

    def _wait(self, keep_from: int) -> int | None:
        self._keep_from = keep_from
        return None

    def _broken(self, problem: str) -> Permanent:
        return Permanent(f"{self._where}: part {self.parts + 1} of the multipart answer: {problem}")

    def _preamble(self, data: bytes, position: int) -> int | None:
        line_start = b"\n" + self._dash_boundary
        found = data.find(line_start, position)
        if found < 0:
            return self._skip_preamble(data, position)
        end = self._line_end(data, found + len(line_start))
        if end is None:
            return self._wait(found)
        if end < 0:
            raise self._broken("the first boundary line goes on after the boundary.")
        # A server that ends this line with LF alone ends all of them so.
        if data[end - 2 : end] != b"\r\n" and data[end - 2 : end] != b"--":
            self._delimiter = b"\n" + self._dash_boundary
        return self._enter_part(data, end)

    def _skip_preamble(self, data: bytes, position: int) -> int | None:
        keep = max(position, len(data) - len(self._delimiter))
        self._preamble_bytes += keep - position
        if self._preamble_bytes > MAX_PREAMBLE_BYTES:
            raise self._broken(f"no boundary in the first {MAX_PREAMBLE_BYTES} bytes.")
        return self._wait(keep)

    def _line_end(self, data: bytes, position: int) -> int | None:
        """Where the delimiter line that starts before `position` ends: behind its line end or its closing `--`.

        None: not all of it is here yet. -1: other text follows, so it is no delimiter.
        """
        tail = data[position : position + MAX_PADDING_BYTES]
        if tail.startswith(b"--"):
            return position + 2
        rest = tail.lstrip(b" \t")
        padding = len(tail) - len(rest)
        if rest.startswith(b"\r\n"):
            return position + padding + 2
        if rest.startswith(b"\n"):
            return position + padding + 1
        if rest in (b"", b"\r") or tail == b"-":
            return None if len(tail) < MAX_PADDING_BYTES else -1
        return -1

    def _enter_part(self, data: bytes, end: int) -> int:
        if data[end - 2 : end] == b"--":
            self.finished = True
        else:
            self._step = self._headers
        return end

    def _headers(self, data: bytes, position: int) -> int | None:
        end, body = _end_of_headers(data, position)
        if (end if body else len(data)) - position > MAX_HEADER_BYTES:
            raise self._broken(f"headers of more than {MAX_HEADER_BYTES} bytes.")
        if not body:
            return self._wait(position)
        headers = self._parse_headers(data[position:end])
        self._left = self._length_of(headers)
        self._sink.begin(headers)
        self._step = self._body if self._left is None else self._counted_body
        return body

    def _parse_headers(self, block: bytes) -> dict[str, str]:
        headers = {}
        for line in block.decode("latin-1").splitlines():
            name, colon, value = line.partition(":")
            if not colon:
                raise self._broken("a header line without a colon.")
            headers[name.strip().lower()] = value.strip()
        if headers.get("content-transfer-encoding", "").lower() not in _BINARY_ENCODINGS:
            raise self._broken("a Content-Transfer-Encoding that DICOMweb does not allow.")
        return headers

    def _length_of(self, headers: Mapping[str, str]) -> int | None:
        text = headers.get("content-length")
        if text is None:
            return None
        if not (text.isascii() and text.isdigit() and len(text) <= 18):
            raise self._broken("a Content-Length that is not a number.")
        return int(text)

    def _counted_body(self, data: bytes, position: int) -> int | None:
        """Passes on exactly Content-Length bytes without looking at them."""
        taken = min(self._left or 0, len(data) - position)
        if taken:
            self._sink.data(memoryview(data)[position : position + taken])
        self._left = (self._left or 0) - taken
        if self._left:
            return self._wait(len(data))
        self._step = self._after_counted_body
        return position + taken

    def _after_counted_body(self, data: bytes, position: int) -> int | None:
        here = data[position : position + len(self._delimiter)]
        end = self._line_end(data, position + len(here)) if here == self._delimiter else None
        if not self._delimiter.startswith(here) or end == -1:
            raise self._broken("no boundary where its Content-Length ends, so its length cannot be trusted.")
        if end is None:
            return self._wait(position)
        return self._end_part(data, end)

    def _body(self, data: bytes, position: int) -> int | None:
        """Passes on bytes up to the next delimiter; holds back what may be the start of one."""
        found = data.find(self._delimiter, position)
        if found < 0:
            safe = max(position, len(data) - len(self._delimiter) + 1)
            self._pass_on(data, position, safe)
            return self._wait(safe)
        end = self._line_end(data, found + len(self._delimiter))
        self._pass_on(data, position, found)
        if end is None:
            return self._wait(found)
        if end < 0:
            self._pass_on(data, found, found + len(self._delimiter))
            return found + len(self._delimiter)
        return self._end_part(data, end)

    def _pass_on(self, data: bytes, start: int, stop: int) -> None:
        if stop > start:
            self._sink.data(memoryview(data)[start:stop])

    def _end_part(self, data: bytes, end: int) -> int:
        self._sink.end()
        self.parts += 1
        return self._enter_part(data, end)


def _end_of_headers(data: bytes, position: int) -> tuple[int, int]:
    """(end of the header block, start of the body); (-1, 0) while the empty line has not come."""
    found = _NO_HEADERS.match(data, position) or _BLANK_LINE.search(data, position, position + MAX_HEADER_BYTES + 4)
    return found.span() if found else (-1, 0)
