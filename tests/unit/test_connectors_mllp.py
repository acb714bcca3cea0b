"""MLLP framing and acknowledgements: pure parts of the connector."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.mllp.acknowledgement import control_id_of, parse_acknowledgement
from connectors.mllp.framing import FrameDecoder, FrameError, encode_frame

messages = st.binary(max_size=60).map(lambda data: data.replace(b"\x0b", b".").replace(b"\x1c", b"."))
noise = st.binary(max_size=10).map(lambda data: data.replace(b"\x0b", b"."))


@given(st.lists(st.tuples(noise, messages), max_size=5), st.integers(1, 30))
def test_frames_are_found_however_cut_joined_or_surrounded(parts: list[tuple[bytes, bytes]], cut: int) -> None:
    stream = b"".join(before + encode_frame(message) for before, message in parts)
    decoder = FrameDecoder(100)
    found = [one for start in range(0, len(stream), cut) for one in decoder.feed(stream[start : start + cut])]
    assert found == [message for _, message in parts]
    assert decoder.noise_bytes == sum(len(before) for before, _ in parts)
    assert decoder.pending_bytes == 0


def test_file_separator_without_carriage_return_does_not_end_a_frame() -> None:
    assert FrameDecoder(100).feed(b"\x0ba\x1cb\x1c\r") == [b"a\x1cb"]


def test_new_start_cuts_off_an_unfinished_frame() -> None:
    decoder = FrameDecoder(100)
    assert decoder.feed(b"\x0bhalf\x0bwhole\x1c\r") == [b"whole"]
    assert decoder.noise_bytes == 4


@pytest.mark.parametrize("stream", [b"\x0b" + b"x" * 11, b"\x0b" + b"x" * 11 + b"\x1c\r"])
@pytest.mark.parametrize("cut", [1, 100])
def test_oversized_frame_is_an_error(stream: bytes, cut: int) -> None:
    decoder = FrameDecoder(10)
    with pytest.raises(FrameError, match="more than 10 bytes"):
        [decoder.feed(stream[start : start + cut]) for start in range(0, len(stream), cut)]
    assert FrameDecoder(11).feed(b"\x0b" + b"x" * 11 + b"\x1c\r") == [b"x" * 11]


@pytest.mark.parametrize("message", [b"a\x0bb", b"a\x1cb", b"\x1c\r"])
def test_reserved_bytes_cannot_be_framed(message: bytes) -> None:
    with pytest.raises(FrameError):
        encode_frame(message)


def test_noise_is_not_kept() -> None:
    decoder = FrameDecoder(10)
    for _ in range(50):
        assert decoder.feed(b"n" * 1000) == []
    assert (decoder.noise_bytes, len(decoder._buffer)) == (50_000, 0)


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_acknowledgement_is_read_with_any_segment_end(end: str) -> None:
    lines = ["MSH|^~\\&|RIS||X||2024||ACK|9|P|2.5.1", "MSA|AE|C1|wrong", "ERR||PID^1|101^Missing^HL70357|E|||diag|user"]
    answer = parse_acknowledgement(end.join(lines).encode(), "utf-8")
    assert answer is not None
    assert (answer.code, answer.control_id, answer.text) == ("AE", "C1", "wrong; 101 Missing diag user")


def test_acknowledgement_with_its_own_separators_and_character_set() -> None:
    answer = parse_acknowledgement("MSH#*~\\&#RIS\rMSA#AR#C1#gr\u00fcn\rERR##x#1*two".encode("latin-1"), "latin-1")
    assert answer is not None
    assert (answer.code, answer.text) == ("AR", "gr\u00fcn; 1 two")


@pytest.mark.parametrize(
    "raw",
    [b"", b"MSA|AA|C1", b"MSH|^~\\&|R\rMSA|OK|C1", b"MSH|^~\\&|R\rMSA|AA", b"MSH|^~\\&|R\rPID|AA|C1", b"MSH", b"\xff"],
)
def test_what_is_no_acknowledgement(raw: bytes) -> None:
    assert parse_acknowledgement(raw, "utf-8") is None


def test_control_id_is_the_tenth_field_of_the_header() -> None:
    header = b"MSH|^~\\&|a|b|c|d|20240101||ORU^R01|ID7|P|2.5.1"
    assert control_id_of(header + b"\rPID|x") == control_id_of(header + b"\nPID") == b"ID7"
    assert control_id_of(b"PID|1|2|3|4|5|6|7|8|9|10") is None
    assert control_id_of(b"MSH|^~\\&|a") is None
