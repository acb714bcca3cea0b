"""DICOM headers to the study: b-values of every vendor, identities, and headers full of garbage."""

import warnings
from datetime import date
from io import BytesIO
from typing import Any

import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.filewriter import write_dataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag

from mappings.inputs.dicom_to_study import datasets_to_study, parse_date, read_b_value
from mappings.model.study import Study
from mappings.reading.series_to_roles import SERIES_ATTRIBUTES, STUDY_ATTRIBUTES
from tests.dicom_sources import build_sources

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def study(*datasets: Dataset) -> Study:
    return datasets_to_study((f"f{n}.dcm", ds) for n, ds in enumerate(datasets))


def codes_of(found: Study) -> list[tuple[str, str]]:
    return [(p.code, p.where) for p in found.problems]


# What is read


def test_study_series_and_instances_are_read() -> None:
    found = study(*build_sources(ContrastBolusAgent="Gd", EchoTime="104", MRAcquisitionType="2D"))
    assert found.patient.patient_id == "TEST-001"
    assert (found.patient.name, found.patient.birth_date, found.patient.sex) == (
        "Phantom^Peter",
        date(1961, 5, 6),
        "M",
    )
    assert (found.accession_number, found.study_date, found.description) == ("ACC-1", date(2026, 3, 4), "MR Prostate")
    (series,) = found.series
    assert (series.series_number, series.description, series.contrast_agent) == (4, "t2_tse_tra", "Gd")
    assert (series.echo_time_ms, series.image_type) == (104.0, ("ORIGINAL", "PRIMARY", "M"))
    assert len(series.instances) == 11
    assert series.instances[0].position_mm == (-20.0, -16.0, -15.0)
    assert series.instances[0].pixel_spacing_mm == (1.0, 1.0)
    assert found.problems == ()


def test_series_are_sorted_by_number_and_those_without_come_last() -> None:
    numbers = [9, None, 2, 0]
    datasets = [
        build_sources((1, 4, 4), SeriesNumber=n, SeriesInstanceUID=f"1.2.{k}", SOPInstanceUID=f"1.3.{k}")[0]
        for k, n in enumerate(numbers)
    ]
    assert [s.series_number for s in study(*datasets).series] == [0, 2, 9, None]


def test_no_instance_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="no DICOM instances"):
        datasets_to_study([])


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("20260304", date(2026, 3, 4)),
        ("", None),
        ("2026", None),
        ("202613", None),
        ("2026111", None),
        ("20261301", None),
        ("20260230", None),
        ("2026.03.04", None),
        ("202603041015", None),
        ("２０２６０３０４", None),  # noqa: RUF001
        ("00000000", None),
    ],
)
def test_dates_are_read_only_where_they_are_whole(text: str, day: date | None) -> None:
    assert parse_date(text) == day


def test_several_values_of_a_text_stay_as_on_the_wire() -> None:
    (found,) = study(build_sources((1, 4, 4), SeriesDescription=["t2", "tra"])[0]).series
    assert found.description == "t2\\tra"


# b-values


def private(group: int, creator: str, offset: int, vr: str, value: Any) -> Dataset:
    ds = Dataset()
    ds.private_block(group, creator, create=True).add_new(offset, vr, value)
    return ds


def named(name: str) -> Dataset:
    ds = Dataset()
    ds.SequenceName = name
    return ds


def standard(value: float) -> Dataset:
    ds = Dataset()
    ds.DiffusionBValue = value
    return ds


GE, SIEMENS, PHILIPS = (0x43, "GEMS_PARM_01", 0x39), (0x19, "SIEMENS MR HEADER", 0x0C), (0x2001, "Philips", 0x03)


@pytest.mark.parametrize(
    ("ds", "b_value"),
    [
        (Dataset(), None),
        (standard(1400.0), 1400),
        (standard(0.0), 0),
        (private(*SIEMENS, "IS", "800"), 800),
        (private(*SIEMENS, "UN", b"800 "), 800),
        (private(0x19, "SOMEONE ELSE", 0x0C, "IS", "800"), None),
        (private(*GE, "IS", [1000000050, 8, 0, 0]), 50),
        (private(*GE, "IS", [800, 8, 0, 0]), 800),
        (private(*GE, "UN", b"1000001400\\8\\0\\0"), 1400),
        (private(*GE, "IS", "0"), 0),
        (private(*GE, "IS", "-5"), None),
        (private(*PHILIPS, "FL", 1500.0), 1500),
        (private(*PHILIPS, "UN", b"\x00\x00\x7a\x44"), 1000),
        (private(*PHILIPS, "UN", b"\x00\x00\xc0\x7f"), None),
        (named("*ep_b1000t"), 1000),
        (named("ep_b50#3"), 50),
        (named("*ep_b50_800"), None),
        (named("*tse2d1_25"), None),
    ],
)
def test_b_value(ds: Dataset, b_value: float | None) -> None:
    assert read_b_value(ds) == b_value


def test_standard_element_wins_over_private_ones_and_name() -> None:
    ds = private(*SIEMENS, "IS", "50")
    ds.DiffusionBValue, ds.SequenceName = 1400.0, "*ep_b800t"
    assert read_b_value(ds) == 1400


# Problems


def one(number: int, **changes: Any) -> Dataset:
    return build_sources((1, 4, 4), **{"SOPInstanceUID": f"1.3.{number}", **changes})[0]


def test_repeated_instance_is_kept_once_and_named() -> None:
    found = study(one(1), one(2), one(1))
    assert codes_of(found) == [("repeated-instance", "1.3.1")]
    assert "f2.dcm repeats SOP Instance UID 1.3.1 of f0.dcm" in found.problems[0].message
    assert len(found.series[0].instances) == 2


def test_instance_of_another_study_is_left_out_and_named() -> None:
    found = study(one(1, StudyInstanceUID="1.9"), one(2), one(3))
    assert codes_of(found) == [("other-study", "f0.dcm")]
    assert len(found.series[0].instances) == 2


def test_another_patients_instance_is_named_and_the_study_is_that_of_most() -> None:
    found = study(one(1, PatientID="OTHER", PatientName="Canary^Carl"), one(2), one(3))
    assert codes_of(found) == [("other-patient", "1.3.1")]
    assert found.patient.patient_id == "TEST-001"
    assert "Canary" not in found.problems[0].message
    assert "OTHER" not in found.problems[0].message


@pytest.mark.parametrize(
    ("keyword", "values", "says"),
    [
        ("PatientBirthDate", ("19610506", "19610507"), "2 different birth dates"),
        ("PatientSex", ("M", "F"), "2 different sexes"),
        ("AccessionNumber", ("A1", "A2"), "2 different accession numbers"),
        ("IssuerOfPatientID", ("HOSPITAL A", "HOSPITAL B"), "2 different issuers"),
    ],
)
def test_contradicting_identities_are_named_without_their_values(
    keyword: str, values: tuple[str, str], says: str
) -> None:
    found = study(*(one(n, **{keyword: value}) for n, value in enumerate((*values, ""))))
    assert codes_of(found) == [("identity-conflict", keyword)]
    assert says in found.problems[0].message
    assert not any(value in found.problems[0].message for value in values)


# Garbage


def test_long_ids_and_control_characters_are_kept_as_they_are() -> None:
    name = "Canary\x07\x1b^Carl\x00"
    found = study(one(1, PatientID="9" * 200, PatientName=name))
    assert found.patient.patient_id == "9" * 200
    assert found.patient.name == "Canary\x07\x1b^Carl"


KEYWORDS = [
    *("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "PatientID", "PatientName"),
    *("PatientBirthDate", "PatientSex", "AccessionNumber", "IssuerOfAccessionNumberSequence", "StudyDate", "StudyTime"),
    *("Modality", "SeriesNumber", "SeriesDescription", "ImageType", "ScanningSequence", "SequenceName", "EchoTime"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "NumberOfFrames"),
    *("InstanceNumber", "DiffusionBValue", "FrameOfReferenceUID", "SpecificCharacterSet", "SliceThickness"),
    *("ContrastBolusAgent", "AcquisitionTime", "MagneticFieldStrength", "BodyPartExamined"),
]
TAGS = [*map(Tag, KEYWORDS), *(Tag(t) for t in (0x0019100C, 0x00190010, 0x00431039, 0x00430010, 0x20011003))]
VRS = ["AE", "AS", "AT", "CS", "DA", "DS", "FD", "FL", "IS", "LO", "LT", "OB", "PN", "SH", "SQ", "SS", "UI", "UL"]
VRS += ["UN", "US", "UT", "XX", "OW", "SV"]
RAW = st.binary(max_size=40) | st.text(max_size=70).map(lambda t: t.encode("utf-8", "replace")) | st.none()
ELEMENTS = st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from(VRS), RAW), max_size=12)


def build_garbage(elements: list[tuple[Any, str, bytes | None]]) -> Dataset:
    """Elements as a broken file gives them: the bytes are converted only when someone asks for the value."""
    raw = {tag: RawDataElement(tag, vr, len(value or b""), value, 0, False, True) for tag, vr, value in elements}
    return Dataset(raw)  # type: ignore[arg-type]


def look_at_all(found: Study) -> None:
    for series in found.series:
        assert all(isinstance(read(series), tuple) for read in SERIES_ATTRIBUTES.values())
    assert all(isinstance(read(found), tuple) for read in STUDY_ATTRIBUTES.values())


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ELEMENTS, min_size=1, max_size=4))
def test_no_garbage_in_an_element_ever_raises(headers: list[list[tuple[Any, str, bytes | None]]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = study(*map(build_garbage, headers))
    assert sum(len(s.instances) for s in found.series) + len(found.problems) >= 1
    look_at_all(found)


VALUES = st.one_of(
    st.none(),
    st.text(max_size=80),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.binary(max_size=8),
    st.lists(st.text(max_size=5), max_size=4),
    st.lists(st.floats(), max_size=7),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(KEYWORDS), VALUES, max_size=10))
def test_no_value_of_the_wrong_kind_ever_raises(values: dict[str, Any]) -> None:
    ds = build_sources((1, 4, 4))[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for keyword, value in values.items():
            try:
                setattr(ds, keyword, value)
            except Exception:
                continue  # pydicom itself refuses to hold it
        look_at_all(study(ds, one(2)))


def test_sequence_or_bytes_where_text_belongs_count_as_not_stated() -> None:
    ds = one(1)
    ds[Tag("PatientName")] = pydicom.DataElement("PatientName", "SQ", Sequence([Dataset()]))
    ds[Tag("Modality")] = pydicom.DataElement("Modality", "OB", b"\x00\x01")
    ds[Tag("ImageType")] = pydicom.DataElement("ImageType", "US", 7)
    found = study(ds)
    assert (found.patient.name, found.series[0].modality, found.series[0].image_type) == ("", "", ("7",))


@pytest.mark.parametrize("cut", range(0, 400, 7))
def test_a_header_cut_anywhere_is_read_as_far_as_it_goes(cut: int) -> None:
    buffer = pydicom.filebase.DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    write_dataset(buffer, one(1))
    try:
        ds = pydicom.dcmread(BytesIO(buffer.getvalue()[:cut]), force=True)
    except Exception:
        return
    look_at_all(study(ds))
