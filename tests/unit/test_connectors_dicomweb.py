"""Pure parts of the DICOMweb connector: store outcomes, attribute matching, the spool folder."""

import os
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from connectors.dicomweb.matching import matches
from connectors.dicomweb.outcomes import outcomes_of, reason_of
from connectors.dicomweb.spool import Spool
from connectors.dicomweb.uids import checked_uid
from connectors.errors import Permanent

XML = b"""<?xml version="1.0" encoding="utf-8"?>
<NativeDicomModel xmlns="http://dicom.nema.org/PS3.19/models/NativeDICOM">
  <DicomAttribute tag="00081198" vr="SQ" keyword="FailedSOPSequence"><Item number="1">
    <DicomAttribute tag="00081155" vr="UI"><Value number="1">1.2</Value></DicomAttribute>
    <DicomAttribute tag="00081197" vr="US"><Value number="1">272</Value></DicomAttribute></Item></DicomAttribute>
  <DicomAttribute tag="00081199" vr="SQ" keyword="ReferencedSOPSequence"><Item number="1">
    <DicomAttribute tag="00081155" vr="UI"><Value number="1">1.1</Value></DicomAttribute></Item></DicomAttribute>
</NativeDicomModel>"""


def test_native_xml_is_read_like_json() -> None:
    outcomes = outcomes_of(XML, ["1.1", "1.2", "1.3"])
    assert outcomes is not None
    assert [one.stored for one in outcomes] == [True, False, False]
    assert outcomes[1].reason == "processing failure (0110H)"


def test_entities_in_xml_are_not_expanded() -> None:
    bomb = XML.replace(b"<Native", b'<!DOCTYPE x [<!ENTITY a "1.1">]><Native', 1)
    assert outcomes_of(bomb, ["1.1"]) is None


def test_warning_is_told_and_failure_outweighs_success() -> None:
    item = '{"00081155": {"Value": ["%s"]}%s}'
    warned, failed = item % ("1.1", ', "00081196": {"Value": [45056]}'), item % ("1.2", "")
    body = f'{{"00081199": {{"Value": [{warned}, {failed}]}}, "00081198": {{"Value": [{failed}]}}}}'
    first, second = outcomes_of(body.encode(), ["1.1", "1.2"]) or ()
    assert (first.stored, first.warning) == (True, "some elements were coerced (B000H)")
    assert (second.stored, second.reason) == (False, "the server gave no reason")


@pytest.mark.parametrize(
    "body",
    [b'{"00081199": 7}', b'{"00081199": {"Value": [null, 3, {}]}}', b'[{"00081198": {"Value": {}}}]'],
)
def test_odd_responses_store_nothing(body: bytes) -> None:
    outcomes = outcomes_of(body, ["1.1"])
    assert outcomes is not None
    assert [one.stored for one in outcomes] == [False]


@pytest.mark.parametrize(
    ("code", "text"),
    [(0xA701, "out of resources"), (0xC010, "cannot understand"), (0x1234, "own"), (None, "no reason")],
)
def test_codes_have_words(code: int | None, text: str) -> None:
    assert text in reason_of(code)


@pytest.mark.parametrize(
    ("keyword", "wanted", "expected"),
    [
        ("PatientID", "AB1", True),
        ("PatientID", "ab1", False),
        ("PatientID", "A*", True),
        ("PatientID", "A?", False),
        ("PatientID", "", True),
        ("PatientID", ".*", False),
        ("PatientName", "doe*", True),
        ("StudyDate", "20240101-20240131", True),
        ("StudyDate", "20240116-", False),
        ("StudyDate", "-20240115", True),
        ("StudyDate", "-202401", True),
        ("StudyInstanceUID", "1.9,1.2.3", True),
        ("StudyInstanceUID", "1.9\\1.2", False),
        ("ImageType", "PRIMARY", True),
        ("ImageType", "SECONDARY", False),
        ("AccessionNumber", "1", False),
    ],
)
def test_matching(keyword: str, wanted: str, expected: bool) -> None:
    header = Dataset()
    header.PatientID, header.PatientName, header.StudyDate = "AB1", "Doe^Jane", "20240115"
    header.StudyInstanceUID, header.ImageType = "1.2.3", ["ORIGINAL", "PRIMARY"]
    assert matches(header, Tag(keyword), wanted) is expected


@pytest.mark.parametrize("uid", ["", "1..2", "1.2/..", "1.2\n", "1." * 33 + "1", "a", "1.2?x=1"])
def test_what_is_no_uid(uid: str) -> None:
    with pytest.raises(Permanent, match="not a DICOM UID"):
        checked_uid(uid, "It")


def test_spool_removes_what_was_abandoned_long_ago_only(tmp_path: Path) -> None:
    old, new, other = (tmp_path / name for name in (".study.partial-old", ".study.partial-new", ".other.partial-old"))
    for folder in (old, new, other):
        folder.mkdir()
    for folder in (old, other):
        os.utime(folder, (0, 0))
    with Spool(tmp_path / "study", where="x", max_bytes=1) as spool:
        spool.begin({})
        spool.data(memoryview(b"1"))
        spool.end()
        spool.commit("1.2")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.partial-old", ".study.partial-new", "study"]
