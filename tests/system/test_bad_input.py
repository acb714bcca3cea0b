"""What is asked wrongly, and images that cannot be read: each ends with its exit code and a sentence that says why."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from deploy.hospital.process import free_port
from tests.charts import REAL_STUDY, REAL_STUDY_UID, real_chart
from tests.commands import Ended, assert_no_result, run_wetread, write_config
from tests.studies import (
    ADC,
    HBV,
    MISSING_SLICE,
    T2W,
    change,
    cut,
    instances,
    link_study,
    replace_series,
    series_folder,
)

USAGE, UNMATCHED, UNUSABLE = 2, 3, 4


def process(folder: Path, source: object, *more: object) -> Ended:
    return run_wetread(folder, "process", source, "--out", folder / "out", *more, timeout_s=60)


def said(ended: Ended, code: int, *words: str) -> None:
    assert ended.code == code, ended.said
    for each in words:
        assert each in ended.err, ended.err
    assert len(ended.err.strip().splitlines()) <= 14, "a reason is read by a person: few lines"


# Asked wrongly


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    said(process(tmp_path, tmp_path / "nowhere"), USAGE, "nowhere", "is not there")
    assert_no_result(tmp_path / "out", trace=False)


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    said(process(tmp_path, instances(REAL_STUDY, T2W)[0]), USAGE, "1-01.dcm is a file", "give the folder")


def test_a_study_uid_without_a_pacs(tmp_path: Path) -> None:
    said(process(tmp_path, REAL_STUDY_UID), USAGE, "needs a PACS", "pacs.url in wetread.yaml")


def test_an_option_that_there_is_not(tmp_path: Path) -> None:
    ended = process(tmp_path, REAL_STUDY, "--nonsense")
    assert ended.code == USAGE
    assert "--nonsense" in ended.err


def test_an_out_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    said(process(tmp_path, REAL_STUDY), USAGE, "--out", "cannot be written")
    assert (tmp_path / "out").read_text() == "mine"


CONTEXTS: dict[str, tuple[Any, str]] = {
    "not-there": (None, "cannot be read"),
    "not-json": ('{"resourceType": "Bundle",\n "entry": [', "not JSON, line 2"),
    "not-utf8": (b"\xff\xfe\x00{", "cannot be read"),
    "a-list": ("[]", "must be a FHIR Bundle"),
    "a-patient": ('{"resourceType": "Patient"}', "must be a FHIR Bundle"),
    "entry-no-list": ('{"resourceType": "Bundle", "entry": {}}', "must be a FHIR Bundle"),
    "entry-of-numbers": ('{"resourceType": "Bundle", "entry": [1]}', "every entry must be an object"),
}


@pytest.mark.parametrize("kind", CONTEXTS)
def test_a_context_file_that_is_none(kind: str, tmp_path: Path) -> None:
    content, words = CONTEXTS[kind]
    file = tmp_path / f"{kind}.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    said(process(tmp_path, REAL_STUDY, "--context", file), USAGE, f"{kind}.json", words)
    assert_no_result(tmp_path / "out", trace=False)


def test_a_protocol_that_there_is_not(tmp_path: Path) -> None:
    said(process(tmp_path, REAL_STUDY, "--protocol", "knee_mri"), USAGE, "knee_mri", "prostate_mri")


def test_a_triton_address_that_is_none(tmp_path: Path) -> None:
    said(process(tmp_path, REAL_STUDY, "--triton", "http://triton:8001"), USAGE, "--triton", "must be HOST:PORT")


SETTINGS = {
    "no-yaml": ("pacs: {url: [\n", ("wetread.yaml:2", "not valid YAML")),
    "misspelt": ("pacs:\n  ulr: http://x\n", ("pacs", "ulr")),
    "unknown": ("colour: blue\n", ("colour",)),
    "wrong-type": ("retry: {attempts: many}\n", ("retry.attempts", "valid integer")),
    "out-of-range": ("api: {port: 99999}\n", ("api.port",)),
    "bad-zone": ("site: {time_zone: Mars/Olympus}\n", ("site.time_zone", "Mars/Olympus")),
    "bad-database": ("database_url: mysql://x\n", ("database_url", "postgresql://")),
    "a-list": ("- 1\n- 2\n", ("wetread.yaml",)),
    "no-protocols": ("protocols_dir: nothing-here\n", ("nothing-here", "no protocol files")),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_that_cannot_be_used(kind: str, tmp_path: Path) -> None:
    text, words = SETTINGS[kind]
    write_config(tmp_path, text)
    said(process(tmp_path, REAL_STUDY), USAGE, "Cannot start", *words)


def test_settings_that_are_not_there(tmp_path: Path) -> None:
    said(process(tmp_path, REAL_STUDY, "--config", tmp_path / "other.yaml"), USAGE, "other.yaml is not there")


def test_a_data_dir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    config = [f"data_dir: {tmp_path}/taken/data", f"pacs: {{url: 'http://127.0.0.1:{free_port()}/dicom-web'}}"]
    write_config(tmp_path, config)
    said(process(tmp_path, REAL_STUDY), USAGE, "data_dir", "taken/data")


def test_a_protocol_file_in_error_names_the_line(tmp_path: Path) -> None:
    bundled = Path(__file__).parents[2] / "mappings" / "protocols" / "prostate_mri.yaml"
    lines = bundled.read_text(encoding="utf-8").splitlines()
    number = next(i for i, line in enumerate(lines) if line.startswith("rule:"))
    lines[number] = "rule: pirads_v9"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "p.yaml").write_text("\n".join(lines), encoding="utf-8")
    write_config(tmp_path, "protocols_dir: mine\n")
    said(process(tmp_path, REAL_STUDY), USAGE, f"p.yaml:{number + 1}", "pirads_v9")


# Images


def unusable(folder: Path, study: Path, *words: str, trace: bool = True) -> None:
    said(process(folder, study), UNUSABLE, *words)
    assert_no_result(folder / "out", trace=trace)


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    unusable(tmp_path, tmp_path / "study", "no files at all", trace=False)


def test_a_folder_without_dicom(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "letter.txt").write_text("no images here")
    unusable(tmp_path, tmp_path / "study", "1 file", "none of them DICOM", trace=False)


@pytest.mark.parametrize("share", [0.02, 0.6, 0.999])
def test_a_truncated_file_is_named(share: float, tmp_path: Path) -> None:
    study = link_study(tmp_path / "study")
    cut(instances(study, T2W)[4], share)
    unusable(tmp_path, study, "1-05.dcm")


def test_a_file_of_another_kind_with_a_dicom_name(tmp_path: Path) -> None:
    study = link_study(tmp_path / "study")
    file = instances(study, ADC)[2]
    file.unlink()
    file.write_bytes(b"<html>404 not found</html>")
    unusable(tmp_path, study, file.name, "not DICOM", trace=False)


def test_the_high_b_series_with_a_missing_slice(tmp_path: Path) -> None:
    study = link_study(tmp_path / "study")
    replace_series(study, HBV, next(MISSING_SLICE.iterdir()))
    unusable(tmp_path, study, "hbv", "series 8", "missing")


def test_one_instance_of_another_patient(tmp_path: Path) -> None:
    study = link_study(tmp_path / "study")
    file = instances(study, T2W)[7]

    def other_patient(dataset: Dataset) -> None:
        dataset.PatientID = "SOMEONE-ELSE"

    change([file], other_patient)
    unusable(tmp_path, study, file.name, "patient")


def test_two_studies_in_a_folder(tmp_path: Path) -> None:
    study = link_study(tmp_path / "study")
    uid = generate_uid()

    def other_study(dataset: Dataset) -> None:
        dataset.StudyInstanceUID = uid

    change(instances(study, "9"), other_study)
    unusable(tmp_path, study, "2 studies", uid, trace=False)


def test_a_required_series_that_is_not_there(tmp_path: Path) -> None:
    study = link_study(tmp_path / "study", series=("3", T2W, "5", HBV))
    unusable(tmp_path, study, "Apparent diffusion coefficient map (adc)", "series 4", "series 8")


def test_a_required_series_of_two_frames_of_reference(tmp_path: Path) -> None:
    study = link_study(tmp_path / "study", series=(T2W, ADC, HBV))
    uid = generate_uid()

    def other_frame(dataset: Dataset) -> None:
        dataset.FrameOfReferenceUID = uid

    change(instances(study, ADC), other_frame)
    unusable(tmp_path, study, "adc", "frame of reference")


def test_the_same_slice_twice(tmp_path: Path) -> None:
    study = link_study(tmp_path / "study", series=(T2W, ADC, HBV))
    again = series_folder(study, T2W) / "1-99.dcm"
    again.write_bytes(instances(study, T2W)[3].read_bytes())

    def other_instance(dataset: Dataset) -> None:
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()

    change([again], other_instance)
    unusable(tmp_path, study, "t2w", "series 4")


# Not for us


def unmatched(folder: Path, study: Path, *words: str) -> None:
    said(process(folder, study), UNMATCHED, "No protocol applies", "prostate_mri", *words)
    assert_no_result(folder / "out", trace=True)


def edited(folder: Path, **values: Any) -> Path:
    study = link_study(folder / "study", series=(T2W, ADC, HBV))

    def edit(dataset: Dataset) -> None:
        for keyword, value in values.items():
            setattr(dataset, keyword, value)

    change([f for number in (T2W, ADC, HBV) for f in instances(study, number)], edit)
    return study


def test_no_prostate_study(tmp_path: Path) -> None:
    named = {
        "BodyPartExamined": "KNEE",
        "StudyDescription": "MR knee",
        "SeriesDescription": "knee",
        "ProtocolName": "k",
    }
    unmatched(tmp_path, edited(tmp_path, **named), "neither body part nor any description names the prostate")


def test_no_mr_study(tmp_path: Path) -> None:
    unmatched(tmp_path, edited(tmp_path, Modality="CT"), "no MR images")


def test_a_study_of_a_woman(tmp_path: Path) -> None:
    unmatched(tmp_path, edited(tmp_path, PatientSex="F"), "sex is stated as F")


# Context that speaks of someone else


def held(folder: Path, chart: dict[str, Any], *words: str) -> None:
    context = folder / "context.json"
    context.write_text(json.dumps(chart), encoding="utf-8")
    said(process(folder, REAL_STUDY, "--context", context), UNUSABLE, "identities do not agree", *words)
    assert_no_result(folder / "out", trace=True)


def test_the_context_of_another_patient(tmp_path: Path) -> None:
    held(tmp_path, real_chart(patient_id="OTHER-1"), "context.json", "no single patient")


def test_the_context_of_a_patient_of_another_sex(tmp_path: Path) -> None:
    held(tmp_path, real_chart(sex="O"), "the sex in the images differs")


def test_reasons_hold_no_name_and_no_id_of_the_patient(tmp_path: Path) -> None:
    chart = real_chart(patient_id="OTHER-1", patient_name="Bloggs^Joseph")
    (tmp_path / "context.json").write_text(json.dumps(chart), encoding="utf-8")
    ended = process(tmp_path, REAL_STUDY, "--context", tmp_path / "context.json")
    for private in ("Bloggs", "OTHER-1", "ProstateX-0000"):
        assert private not in ended.err
