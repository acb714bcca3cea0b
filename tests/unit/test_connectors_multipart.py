"""The streaming multipart reader: whatever the borders of chunks, the parts are the parts."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.dicomweb.multipart import MAX_PREAMBLE_BYTES, MultipartReader, boundary_of
from connectors.errors import Permanent, Retryable


class Parts:
    """A sink that keeps everything, and the largest piece it was given."""

    def __init__(self) -> None:
        self.headers: list[Mapping[str, str]] = []
        self.bodies: list[bytes] = []
        self.whole = 0

    def begin(self, headers: Mapping[str, str]) -> None:
        self.headers.append(headers)
        self.bodies.append(b"")

    def data(self, piece: memoryview) -> None:
        self.bodies[-1] += bytes(piece)

    def end(self) -> None:
        self.whole += 1


def read(stream: bytes, *, boundary: bytes = b"b1", cut: int = 0) -> Parts:
    parts = Parts()
    reader = MultipartReader(boundary, parts, where="pacs: retrieve")
    size = cut or max(1, len(stream))
    for start in range(0, len(stream), size):
        reader.feed(stream[start : start + size])
    reader.close()
    assert reader.parts == parts.whole == len(parts.bodies)
    return parts


def stream_of(bodies: list[bytes], *, counted: bool, eol: bytes = b"\r\n", padding: bytes = b"") -> bytes:
    out = b""
    for body in bodies:
        length = b"Content-Length: %d%s" % (len(body), eol) if counted else b""
        out += b"--b1" + padding + eol + b"Content-Type: application/dicom" + eol + length + eol + body + eol
    return out + b"--b1--" + eol


# Bodies full of what looks like a delimiter, so that a wrong guess about borders shows.
tricky = st.lists(
    st.sampled_from([b"\r\n", b"\n", b"\r", b"-", b"--", b"--b", b"--b1x", b"\r\n--b", b"\r\n--b2", b"\x00", b"DICM"])
).map(b"".join)


@given(bodies=st.lists(tricky, min_size=1, max_size=4), counted=st.booleans(), cut=st.integers(1, 40))
def test_parts_come_whole_however_the_stream_is_cut(bodies: list[bytes], counted: bool, cut: int) -> None:
    stream = stream_of(bodies, counted=counted)
    assert read(stream, cut=cut).bodies == read(stream).bodies == bodies


@given(cut=st.integers(1, 60), counted=st.booleans())
def test_preamble_padding_and_epilogue_are_no_part_of_it(cut: int, counted: bool) -> None:
    inner = stream_of([b"one", b"two"], counted=counted, padding=b" \t")
    stream = b"a preamble --b1 with something\r\n" + inner + b"epilogue\r\n--b1\r\n"
    assert read(stream, cut=cut).bodies == [b"one", b"two"]


@pytest.mark.parametrize("cut", [1, 2, 7, 0])
def test_line_feeds_alone_are_taken_where_the_server_uses_them(cut: int) -> None:
    stream = stream_of([b"one\r", b"", b"two"], counted=False, eol=b"\n")
    assert read(stream, cut=cut).bodies == [b"one\r", b"", b"two"]


def test_part_without_headers_and_headers_in_any_case() -> None:
    parts = read(b"--b1\r\n\r\nplain\r\n--b1\r\nCONTENT-type:  application/dicom \r\n\r\nx\r\n--b1--")
    assert parts.bodies == [b"plain", b"x"]
    assert parts.headers == [{}, {"content-type": "application/dicom"}]


@pytest.mark.parametrize("counted", [True, False])
def test_every_truncation_is_retryable(counted: bool) -> None:
    stream = stream_of([b"one", b"two\r\n--b"], counted=counted).removesuffix(b"\r\n")
    assert read(stream).whole == 2
    for end in range(len(stream)):
        with pytest.raises(Retryable, match="stopped before its closing boundary"):
            read(stream[:end])


@pytest.mark.parametrize(
    ("stream", "told"),
    [
        (b"--b1\r\nContent-Length: 2\r\n\r\nabc\r\n--b1--", "no boundary where its Content-Length ends"),
        (b"--b1\r\nContent-Length: 2\r\n\r\nab\r\n--b1zz", "no boundary where its Content-Length ends"),
        (b"--b1\r\nContent-Length: -1\r\n\r\n", "not a number"),
        (b"--b1\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n", "not a number"),
        (b"--b1\r\nno colon here\r\n\r\n", "without a colon"),
        (b"--b1\r\nContent-Transfer-Encoding: base64\r\n\r\n", "Content-Transfer-Encoding"),
        (b"--b1\r\nX: " + b"y" * 17000, "headers of more than"),
        (b"--b1\r\nX: " + b"y" * 17000 + b"\r\n\r\n", "headers of more than"),
        (b"--b1" + b" " * 999 + b"\r\n", "goes on after the boundary"),
        (b"." * (MAX_PREAMBLE_BYTES + 999), "no boundary in the first"),
    ],
)
@pytest.mark.parametrize("cut", [0, 100])
def test_broken_streams_are_permanent(stream: bytes, told: str, cut: int) -> None:
    with pytest.raises(Permanent, match=told):
        read(stream, cut=cut)


def test_body_is_passed_on_as_it_comes() -> None:
    parts = Parts()
    reader = MultipartReader(b"b1", parts, where="x")
    reader.feed(b"--b1\r\n\r\n")
    for _ in range(100):
        reader.feed(b"z" * 10_000)
    # All but what may be the start of a delimiter has left the reader.
    assert 1_000_000 - len(b"\r\n--b1") < len(parts.bodies[0]) <= 1_000_000


@pytest.mark.parametrize(
    ("header", "boundary"),
    [
        ("multipart/related; boundary=abc", b"abc"),
        ('multipart/related; type="application/dicom"; boundary="a b:c"', b"a b:c"),
        ("Multipart/Related;BOUNDARY=abc;type=x", b"abc"),
        ("multipart/related; boundary=" + "a" * 74, b"a" * 74),
    ],
)
def test_boundary_is_read_quoted_or_not(header: str, boundary: bytes) -> None:
    assert boundary_of(header, "pacs") == boundary


@pytest.mark.parametrize(
    "header",
    [
        "",
        "application/dicom",
        "text/html; boundary=x",
        "multipart/related",
        'multipart/related; boundary=""',
        'multipart/related; boundary="a\\"b"',
        "multipart/related; boundary=" + "a" * 300,
    ],
)
def test_no_usable_boundary_is_permanent(header: str) -> None:
    with pytest.raises(Permanent):
        boundary_of(header, "pacs")
