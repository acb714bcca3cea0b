"""Acknowledgements, judged by python-hl7, hl7apy and our own reader."""

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import hl7
import pytest
from hl7apy.consts import VALIDATION_LEVEL  # type: ignore[import-untyped]
from hl7apy.parser import parse_message, parse_segments  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st

from connectors.mllp.acknowledgement import parse_acknowledgement
from mappings.inputs.er7_to_message import read_message
from mappings.model.message import Header, Message
from mappings.outputs.message_to_ack import Code, Outcome, build_ack, build_reject, codes_due

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def message(version: str = "2.5.1", *, control_id: str = "77", modes: str = "", charset: str = "") -> Message:
    head = f"MSH|^~\\&|RIS|CLINIC^1.2.3^ISO|WETREAD|AI|20260102||ORM^O01^ORM_O01|{control_id}|T|{version}"
    return read_message(f"{head}|||{modes or '|'}||{charset}\rPID|1||1^^^H^MR".encode())


def ack(to: Message | Header, code: Code = "AA", **more: Any) -> bytes:
    return build_ack(to, code, now=NOW, control_id="WR1", **more)


def test_accept_in_original_mode() -> None:
    answer = ack(message())
    assert answer == (
        b"MSH|^~\\&|WETREAD|AI|RIS|CLINIC^1.2.3^ISO|20260102030405+0000||ACK^O01^ACK|WR1|T|2.5.1\rMSA|AA|77\r"
    )


def judge(answer: str, version: str) -> Any:
    """The answer as hl7apy reads it, strictly. It knows no message by the bare "ACK" that is all v2.3 writes in
    MSH-9, so of that version each segment is judged alone."""
    if version != "2.3":
        strict = parse_message(answer, validation_level=VALIDATION_LEVEL.STRICT)
        assert strict.validate()
        return strict
    segments = {s.name.lower(): s for s in parse_segments(answer, version, validation_level=VALIDATION_LEVEL.STRICT)}
    assert all(segment.validate() for segment in segments.values())
    return SimpleNamespace(**segments)


@pytest.mark.parametrize("version", ["2.3", "2.3.1", "2.4", "2.5", "2.5.1", "2.6"])
@pytest.mark.parametrize("code", ["AA", "AE", "AR", "CA", "CE", "CR"])
def test_judges_read_every_answer(version: str, code: Code) -> None:
    answer = ack(message(version), code, text="PID-3 | is ^ empty", error_code="101").decode()
    theirs = hl7.parse(answer)
    assert theirs.extract_field("MSA", 1, 1) == code
    assert theirs.extract_field("MSA", 1, 2) == "77"
    assert theirs.unescape(str(theirs.segment("MSA")[3])) == "PID-3 | is ^ empty"
    strict = judge(answer, version)
    assert strict.msh.msh_12.to_er7() == version
    assert ("ERR" in answer) == (code not in ("AA", "CA"))
    if "ERR" in answer and version in ("2.5", "2.5.1", "2.6"):
        assert strict.err.err_3.to_er7() == "101^Required field missing^HL70357"
        assert strict.err.err_4.to_er7() == "E"
        assert theirs.unescape(str(theirs.segment("ERR")[8])) == "PID-3 | is ^ empty"
    elif "ERR" in answer:
        assert strict.err.err_1.to_er7() == "^^^101&Required field missing&HL70357"


def test_our_client_reads_it() -> None:
    read = parse_acknowledgement(ack(message(), "AE", text="no such order"), "utf-8")
    assert read is not None
    assert (read.code, read.control_id) == ("AE", "77")
    assert read.text == "no such order; 207 Application internal error no such order"


@pytest.mark.parametrize(
    ("modes", "outcome", "codes"),
    [
        ("|", "accept", ("AA",)),
        ("|", "error", ("AE",)),
        ("|", "reject", ("AR",)),
        ("AL|NE", "accept", ("CA",)),
        ("AL|NE", "error", ("CE",)),
        ("AL|NE", "reject", ("CR",)),
        ("AL|AL", "accept", ("CA", "AA")),
        ("AL|AL", "reject", ("CR",)),
        ("NE|AL", "accept", ("AA",)),
        ("NE|AL", "reject", ("AR",)),
        ("|AL", "accept", ("AA",)),
        ("NE|NE", "accept", ()),
        ("NE|NE", "reject", ()),
        ("ER|NE", "accept", ()),
        ("ER|NE", "error", ("CE",)),
        ("SU|ER", "accept", ("CA",)),
        ("SU|ER", "error", ("AE",)),
        ("XX|NE", "accept", ("CA",)),
    ],
)
def test_answers_that_the_sender_waits_for(modes: str, outcome: Outcome, codes: tuple[Code, ...]) -> None:
    assert codes_due(message(modes=modes).header, outcome) == codes


def test_enhanced_answers_ask_for_no_answer() -> None:
    header = read_message(ack(message(modes="AL|AL"), "CA")).header
    assert (header.accept_acknowledgement, header.application_acknowledgement) == ("NE", "NE")


def test_answer_in_the_separators_of_the_message() -> None:
    raw = b"MSH#*%!$#RIS#FAC*1.2*ISO#W#A#20260102##ORM*O01#7!F!7#P#2.4\rPID#1"
    answer = ack(read_message(raw), "AR", text="100 # * % ! $ | ^ of 100")
    again = read_message(answer)
    assert again.header.encoding.msh_2 == "*%!$"
    assert b"MSA#AR#7!F!7#" in answer
    assert again.first("MSA").text(3) == "100 # * % ! $ | ^ of 100"
    assert again.header.receiving_facility == "FAC"


@pytest.mark.parametrize(
    ("charset", "codec"),
    [
        ("8859/1", "latin-1"),
        ("UNICODE UTF-8", "utf-8"),
        ("", "utf-8"),
        ("~ISO IR87", "iso2022_jp_ext"),
        ("ASCII", "ascii"),
    ],
)
def test_answer_in_the_character_set_of_the_message(charset: str, codec: str) -> None:
    answer = ack(message(charset=charset), "AE", text="über")
    assert ("?ber" if codec == "ascii" else "über") in answer.decode(codec)
    assert read_message(answer).header.character_set == charset


def test_version_not_known_is_answered_as_2_5_1() -> None:
    assert (
        read_message(
            build_reject(b"MSH|^~\\&|A|B|C|D|1||ORM^O01|5|P|9.9", "no", now=NOW, control_id="1")
        ).header.version
        == "2.5.1"
    )


@pytest.mark.parametrize(
    ("raw", "control_id"),
    [
        (b"", ""),
        (b"MSH", ""),
        (b"GET / HTTP/1.1\r\n\r\n", ""),
        (b"\x00\xff\xfe garbage", ""),
        (b"MSH|^~\\&|A|B|C|D|1||ORM^O01|MY-ID|P|2.2\rPID|1", "MY-ID"),
        (b"MSH|^^^^|A|B|C|D|1||ORM^O01|MY-ID|P|2.3\rPID|1", "MY-ID"),
        (b"noise MSH|^~\\&|A|B|C|D|1||ORM^O01|MY-ID|P|2.3\rPID|1", "MY-ID"),
        (b"MSH|^~\\&|\xfc|B|C|D|1||ORM^O01|MY-ID|P|2.3\rPID|1", "MY-ID"),
    ],
)
def test_garbage_is_rejected_with_the_control_id_if_it_can_be_read(raw: bytes, control_id: str) -> None:
    answer = build_reject(raw, "the message does not begin with MSH", now=NOW, control_id="WR2", error_code="100")
    read = read_message(answer)
    assert (read.first("MSA").text(1), read.first("MSA").text(2)) == ("AR", control_id)
    assert read.first("MSA").text(3) == "the message does not begin with MSH"
    err = read.first("ERR")
    assert (
        (err.text(1, 4), err.text(8)) == ("100", "")
        if read.header.version == "2.3"
        else ("", read.first("MSA").text(3))
    )
    if control_id:  # MSA-2 is required, but there is nothing true to put there
        assert judge(answer.decode(read.header.encoding.codec), read.header.version)


def test_control_characters_cannot_end_the_frame() -> None:
    """An FS before the CR of MSA would be MLLP's end of the message."""
    raw = b"MSH|^~\\&|A\x0b|B|C|D|1||ORM^O01|7\x1c|P\x1c|2.3|||||\x1c\rPID|1"
    answer = build_reject(raw, "broken\x1c\r\x0b", now=NOW, control_id="WR3")
    assert not set(answer) & {0x0B, 0x1C}
    assert answer.count(b"\r") == 3


def test_long_texts_are_cut() -> None:
    read = read_message(ack(message(), "AE", text="word." * 100))
    assert len(read.first("MSA").text(3)) == 80
    assert len(read.first("ERR").text(8)) == 250


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.text(max_size=300))
def test_any_bytes_and_reason_give_one_readable_answer(raw: bytes, reason: str) -> None:
    for candidate in (raw, b"MSH" + raw, b"MSH|^~\\&|" + raw, b"MSH|^~\\&|A|B|C|D|1||X|" + raw):
        answer = build_reject(candidate, reason, now=NOW, control_id="WR4")
        read = read_message(answer)
        assert [segment.name for segment in read.segments()] == ["MSH", "MSA", "ERR"]
        assert read.first("MSA").text(1) == "AR"
        assert not set(answer) & {0x0B, 0x1C}
