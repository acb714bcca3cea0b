"""The HL7 v2 reader: against what python-hl7 and hl7apy read, against our writer, and against hostile bytes."""

import hashlib
import time

import hl7
import pytest
from hl7apy.parser import parse_message  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st

from mappings.inputs.er7_characters import find_codec
from mappings.inputs.er7_to_message import UnreadableMessage, read_message
from mappings.model.message import Encoding, Header, sketch_header, unescape
from mappings.outputs.er7 import Field, text_value, write_message, write_segment

HEAD = "MSH|^~\\&|RIS|CLINIC|WETREAD|AI|20260102030405+0100||ORM^O01^ORM_O01|MSG1|P|2.5.1"
SAMPLE = f"{HEAD}|||AL|NE||UNICODE UTF-8\rPID|1||4711^^^HOSP^MR~99^^^&1.2.3&ISO^PI||Müller^Ann\rORC|NW|P1|F1\r".encode()


def reject(raw: bytes) -> UnreadableMessage:
    with pytest.raises(UnreadableMessage) as caught:
        read_message(raw)
    return caught.value


def test_header_and_values() -> None:
    message = read_message(SAMPLE)
    header = message.header
    assert (header.sending_application, header.sending_facility) == ("RIS", "CLINIC")
    assert (header.event, header.structure, header.control_id) == ("ORM^O01", "ORM_O01", "MSG1")
    assert (header.processing_id, header.version, header.message_time) == ("P", "2.5.1", "20260102030405+0100")
    assert (header.accept_acknowledgement, header.application_acknowledgement) == ("AL", "NE")
    assert message.warnings == ()
    assert message.digest == hashlib.sha256(SAMPLE).hexdigest()
    pid = message.first("PID")
    assert (pid.text(3), pid.text(3, 4), pid.text(3, 5)) == ("4711", "HOSP", "MR")
    assert pid.text(3, 4, 2, repetition=2) == "1.2.3"
    assert pid.text(5) == "Müller"
    assert (pid.text(3, 9), pid.text(99), pid.text(3, repetition=3), pid.text(3, 0), pid.text(0)) == ("",) * 5
    assert [s.name for s in message.segments()] == ["MSH", "PID", "ORC"]
    assert message.segments("ZZZ") == ()
    assert message.first("ZZZ").text(1) == ""
    msh = message.first("MSH")
    assert (msh.text(1), msh.text(2), msh.text(3)) == ("|", "^~\\&", "RIS")


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_any_segment_end(end: str) -> None:
    message = read_message(SAMPLE.decode().replace("\r", end).encode())
    assert message.lines == read_message(SAMPLE).lines


def test_byte_order_mark_framing_and_blank_lines_around() -> None:
    message = read_message(b"\x0b\xef\xbb\xbf\r\n" + SAMPLE + b"\r\n\x1c\r")
    assert message.lines == read_message(SAMPLE).lines
    assert "byte order mark" in message.warnings[0]


def test_null_is_not_absent() -> None:
    pid = read_message(f'{HEAD}\rPID|1||5||""|^""^b|x&""'.encode()).first("PID")
    assert pid.is_null(5)
    assert pid.text(5) == ""
    assert not pid.is_null(4)
    assert (pid.is_null(6), pid.is_null(6, 2), pid.is_null(7, 1, 2)) == (False, True, True)


def test_custom_separators_and_their_escapes() -> None:
    raw = b"MSH#*%!$#RIS#FAC#W#A#20260102##ORM*O01#77#P#2.4\rPID#1##4711***H$1.2$ISO*MR%8#a!F!b!S!c!T!d!R!e!E!f|^~\\&"
    message = read_message(raw)
    pid = message.first("PID")
    assert message.header.control_id == "77"
    assert (pid.text(3), pid.text(3, 4, 2), pid.text(3, repetition=2)) == ("4711", "1.2", "8")
    assert pid.text(4) == "a#b*c$d%e!f|^~\\&"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a\\F\\b\\S\\c\\T\\d\\R\\e\\E\\f", "a|b^c&d~e\\f"),
        ("one\\.br\\two\\.sp2\\x\\.sk3\\y", "one\ntwo\n\nx   y"),
        ("\\H\\bold\\N\\ \\.in+4\\", "bold "),
        ("\\X0D0A\\\\X41\\", "\r\nA"),
        ("\\XC3BC\\", "ü"),
        ("\\XFC\\", "ü"),
        ("\\XF\\ \\XGG\\", "\\XF\\ \\XGG\\"),
        ("\\C2842\\\\M248CA\\\\Z99\\", "\\C2842\\\\M248CA\\\\Z99\\"),
        ("C:\\temp\\F\\x", "C:\\temp|x"),
        ("\\E\\F\\E\\", "\\F\\"),
        ("unterminated \\F", "unterminated \\F"),
        ("\\", "\\"),
        ("\\\\\\\\", "\\\\\\\\"),
        ("\\.sp999999\\", "\n" * 80),
    ],
)
def test_escapes(value: str, expected: str) -> None:
    assert unescape(value, Encoding()) == expected


@pytest.mark.parametrize(
    ("name", "codec", "text"),
    [
        ("ASCII", "ascii", "plain"),
        ("8859/1", "latin-1", "Müller"),
        ("8859/2", "iso8859-2", "Łódź"),
        ("8859/7", "iso8859-7", "Αθήνα"),
        ("8859/15", "iso8859-15", "10 €"),
        ("UNICODE UTF-8", "utf-8", "Müller 山田"),
        ("~ISO IR87", "iso2022_jp", "山田^太郎"),
        ("ASCII~ISO IR87~ISO IR159", "iso2022_jp_ext", "山田|太郎"),
        ("ISO IR14~ISO IR87", "iso2022_jp", "やまだ"),
        ("GB 18030-2000", "gb18030", "王小东"),
        ("KS X 1001", "euc_kr", "김희중"),
        ("BIG-5", "big5", "許功蓋"),
    ],
)
def test_msh_18_decides_the_character_set(name: str, codec: str, text: str) -> None:
    message = read_message(f"{HEAD}||||||{name}\rPID|1||2||{text}|after".encode(codec))
    assert message.first("PID").line == f"PID|1||2||{text}|after"
    assert message.warnings == ()


def test_undeclared_latin_is_read_as_cp1252_with_a_warning() -> None:
    message = read_message(f"{HEAD}\rPID|1||2||Müller €".encode("cp1252"))
    assert message.first("PID").text(5) == "Müller €"
    assert "MSH-18 is empty" in message.warnings[0]
    assert read_message(f"{HEAD}\rPID|1||2||Müller".encode()).warnings == ()


def test_wrong_bytes_under_a_declared_set_spoil_no_other_line() -> None:
    lines = [f"{HEAD}||||||UNICODE UTF-8".encode(), "PID|1||2||Müller".encode("latin-1"), "NTE|1||Größe".encode()]
    message = read_message(b"\r".join(lines))
    assert (message.first("PID").text(5), message.first("NTE").text(3)) == ("Müller", "Größe")
    assert "MSH-18 says utf-8" in message.warnings[0]
    undefined = read_message(f"{HEAD}\rPID|1||2||".encode() + b"\x81\xff\x9d")
    assert undefined.first("PID").text(5) == "\x81ÿ\x9d"


def test_windows_characters_under_8859_1() -> None:
    message = read_message(f"{HEAD}||||||8859/1\rPID|1||2||“ü”".encode("cp1252"))
    assert message.first("PID").text(5) == "“ü”"
    assert message.warnings


def test_unknown_character_set_is_named() -> None:
    message = read_message(f"{HEAD}||||||CNS 11643-1992\rPID|1||2||Ü".encode())
    assert "CNS 11643-1992" in message.warnings[0]
    assert find_codec(["8859/12"]) == ""
    assert find_codec(["8859/99"]) == ""


def test_bare_line_breaks_inside_a_text_are_put_back() -> None:
    message = read_message(f"{HEAD}\rOBX|1|TX|R||first\nMRI\n\nand last||||||F\rNTE|1||x".encode())
    obx = message.first("OBX")
    assert obx.text(5) == "first\nMRI\n\nand last"
    assert obx.text(11) == "F"
    assert message.warnings == ("2 lines are no segments; each was taken as text that belongs to the line before it",)
    assert [s.name for s in read_message(f"{HEAD}\rPV2\rPID|1".encode()).segments()] == ["MSH", "PV2", "PID"]


def test_control_characters_are_kept_and_warned_of() -> None:
    message = read_message(f"{HEAD}\rPID|1||2||a\x00b\x07".encode())
    assert message.first("PID").text(5) == "a\x00b\x07"
    assert message.warnings == ("control characters in the text",)


@pytest.mark.parametrize(
    ("raw", "reason", "control_id"),
    [
        (b"", "empty", ""),
        (b"\r\n\x00 ", "empty", ""),
        (b"MSH", "ends after MSH", ""),
        (b"MSH\rPID|1", "ends after MSH", ""),
        (b"MSH|", "0 encoding characters", ""),
        (b"MSH|^~\\&", "MSH-10", ""),
        (b"MSH|^~\\|A|B|C|D|20260101||ORM^O01|77|P|2.3", "3 encoding characters", "77"),
        (b"MSH||A|B|C|D|20260101||ORM^O01|77|P|2.3", "0 encoding characters", "77"),
        (b"MSH|A|B|C|D|20260101||ORM^O01|77|P|2.3", "1 encoding characters", ""),
        (b"MSH|^~|&|A|B|C|D|20260101||ORM^O01|77|P|2.3", "2 encoding characters", ""),
        (b"MSH|^^\\&|A|B|C|D|20260101||ORM^O01|77|P|2.3", "one character for two", "77"),
        (b"MSH|^~\\^&|A|B|C|D|20260101||ORM^O01|77|P|2.3", "one character for two", "77"),
        (b"MSH|^ \\&|A|B|C|D|20260101||ORM^O01|77|P|2.3", "white space", "77"),
        (b"MSH|^~\\\xe9|A|B|C|D|20260101||ORM^O01|77|P|2.3", "non-ASCII", ""),
        (b"MSH ^~\\& A B C D", "MSH-1", ""),
        (b"MSHX^~\\&XAXB", "MSH-1", ""),
        (b"MSH|^~\\&|A|B|C|D|20260101||ORM^O01||P|2.3", "MSH-10 (message control id) is empty", ""),
        (b"MSH|^~\\&|A|B|C|D|20260101||ORM^O01| |P|2.3", "MSH-10 (message control id) is empty", " "),
        (b"MSH|^~\\&|A|B|C|D|20260101||ORM^O01|7\x007|P|2.3", "control characters", "7\x007"),
        (b"MSH|^~\\&|A|B|C|D|20260101|||77|P|2.3", "MSH-9", "77"),
        (b"MSH|^~\\&|A|B|C|D|20260101||ORM^O01|77|P|2.2", "MSH-12", "77"),
        (b"MSH|^~\\&|A|B|C|D|20260101||ORM^O01|77|P|two", "MSH-12", "77"),
        (b"MSH|^~\\&|A|B|C|D|1||ORM^O01|77|P|2.3\rMSH|^~\\&|A|B|C|D|1||ORM^O01|78|P|2.3", "two messages", "77"),
        (b"MSH|^~\\&|A|B|C|D|1||ORM^O01|77|P|2.3\nPID 1 2 3", "line after MSH", "77"),
        (b"BHS|^~\\&|A", "batch", ""),
        (b"\x89PNG\r\n\x1a\n\x00\x00\xff", "does not begin with MSH", ""),
        ("MSH|^~\\&|A".encode("utf-16"), "UTF-16", ""),
        ("MSH|^~\\&|A".encode("utf-16-le"), "UTF-16", ""),
    ],
)
def test_garbage_is_refused_with_a_reason(raw: bytes, reason: str, control_id: str) -> None:
    error = reject(raw)
    assert reason in error.reason
    assert error.control_id == control_id
    assert error.error_code.isdecimal()


def test_too_long_a_message_is_refused_before_it_is_read() -> None:
    with pytest.raises(UnreadableMessage, match="at most 100 are taken") as caught:
        read_message(SAMPLE + b"x" * 100, max_bytes=100)
    assert caught.value.control_id == "MSG1"


@pytest.mark.parametrize(
    ("version", "warns"), [("2.3", 0), ("2.3.1", 0), ("2.5.1", 0), ("2.6", 1), ("2.8", 1), ("", 1)]
)
def test_versions(version: str, warns: int) -> None:
    message = read_message(f"MSH|^~\\&|A|B|C|D|1||ORM^O01|77|P|{version}^DEU".encode())
    assert len(message.warnings) == warns


def timed(raw: bytes, *reads: tuple[str, int]) -> float:
    start = time.process_time()
    message = read_message(raw)
    for name, field in reads:
        for segment in message.segments(name):
            segment.text(field)
    return time.process_time() - start


def test_large_messages_are_linear() -> None:
    """Generous limits for a busy machine; a quadratic reader would need minutes."""
    head = f"{HEAD}\r".encode()
    assert timed(head + b"OBX|1|TX|1||word\r" * 50_000, ("OBX", 5)) < 3
    assert timed(head + b"OBX|1|TX|1||word\nmore\r" * 50_000, ("OBX", 5)) < 3
    assert timed(head + b"OBX|1|TX|1||" + b"x" * 2_000_000, ("OBX", 5)) < 1
    assert timed(head + b"OBX|1|TX|1||" + b"\\" * 2_000_000, ("OBX", 5)) < 3
    assert timed(head + b"OBX|1|TX|1||" + b"\\X" * 1_000_000, ("OBX", 5)) < 5
    assert timed(head + b"OBX|1|TX|1||\\X" + b"4" * 2_000_000, ("OBX", 5)) < 3
    assert timed(head + b"OBX|1|TX|1||" + b"\\E\\" * 700_000, ("OBX", 5)) < 5
    assert timed(head + b"PID|1||" + b"a~" * 100_000, ("PID", 3)) < 1
    assert timed(head + b"\n" * 2_000_000 + b"PID|1") < 3
    assert timed(head + b"NTE|\n" + b"x\n" * 500_000) < 5


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    for candidate in (raw, b"MSH" + raw, b"MSH|^~\\&" + raw, HEAD.encode() + b"|||||" + raw, SAMPLE + raw):
        try:
            message = read_message(candidate)
        except UnreadableMessage:
            continue
        for segment in message.segments():
            values = [segment.text(n, c, 1, r) for n in range(1, 22) for c in (1, 2) for r in (1, 2)]
            "".join(values).encode("utf-8")
    assert isinstance(sketch_header(raw), Header)


_atoms = st.text(st.characters(exclude_categories=["Cs"]), min_size=0, max_size=8).filter(lambda t: t != '""')
_names = st.from_regex(r"[A-LN-Z][A-Z0-9]{2}", fullmatch=True)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(_names, st.lists(st.lists(st.lists(_atoms, max_size=3), max_size=3), max_size=4)), max_size=5)
)
def test_what_our_writer_wrote_is_read_back(segments: list[tuple[str, list[list[list[str]]]]]) -> None:
    """Fields of one repetition, components, subcomponents; any characters, written as escapes where needed."""
    written = []
    for name, values in segments:
        fields: list[Field] = [tuple(tuple(component) for component in field) for field in values]
        written.append(write_segment(name, ["lead", *fields, "end"]))
    message = read_message(write_message([f"{HEAD}||||||UNICODE UTF-8", *written]))
    assert message.warnings == ()
    for (name, values), segment in zip(segments, message.segments()[1:], strict=True):
        assert (segment.name, segment.text(1), segment.text(len(values) + 2)) == (name, "lead", "end")
        for number, field in enumerate(values, 2):
            for c, component in enumerate(field, 1):
                assert [segment.text(number, c, s) for s in range(1, len(component) + 1)] == component


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20), min_size=1, max_size=4)
)
def test_line_breaks_our_writer_escaped_come_back(lines: list[str]) -> None:
    message = read_message(write_message([HEAD, write_segment("NTE", ["1", "", text_value("\n".join(lines))])]))
    assert message.first("NTE").text(3) == "\n".join(lines)


_plain = st.text("abcXYZ019 .,-äß山", min_size=1, max_size=6).map(str.strip).filter(bool)
_field = st.lists(st.lists(st.lists(_plain, min_size=1, max_size=2), min_size=1, max_size=3), min_size=1, max_size=3)


@settings(max_examples=100, deadline=None)
@given(st.lists(_field, min_size=1, max_size=5))
def test_python_hl7_reads_the_same(fields: list[list[list[list[str]]]]) -> None:
    text = "|".join("~".join("^".join("&".join(c) for c in r) for r in f) for f in fields)
    raw = f"{HEAD}\rZZZ|{text}\rPID|1||x"
    ours, theirs = read_message(raw.encode()), hl7.parse(raw)
    for number, field in enumerate(fields, 1):
        for r, repetition in enumerate(field, 1):
            for c, component in enumerate(repetition, 1):
                for s, value in enumerate(component, 1):
                    stated = theirs.extract_field("ZZZ", 1, number, r, c, s)
                    assert ours.first("ZZZ").text(number, c, s, r) == stated == value


def test_hl7apy_reads_the_same() -> None:
    theirs = parse_message(SAMPLE.decode(), find_groups=False)
    ours = read_message(SAMPLE)
    assert ours.first("PID").text(3) == theirs.pid.pid_3[0].cx_1.value
    assert ours.first("PID").text(3, 4, 2, repetition=2) == theirs.pid.pid_3[1].cx_4.hd_2.to_er7()
    assert ours.first("PID").text(5, 2) == theirs.pid.pid_5.xpn_2.value
    assert ours.header.control_id == theirs.msh.msh_10.value
    assert ours.header.structure == theirs.msh.msh_9.msg_3.value
    assert ours.first("ORC").text(3) == theirs.orc.orc_3.value
