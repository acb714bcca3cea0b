"""Systems that are down, slow, wrong or refuse: `wetread process` names the system and the consequence."""

import json
import re
import socket
import subprocess
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import pydicom
import pytest
from fastapi import Response

from deploy.hospital.ehr import RunningEhr, start_fallback
from deploy.hospital.pacs import RunningOrthanc
from deploy.hospital.process import free_port
from deploy.hospital.ris import Behaviour
from deploy.hospital.ris_process import RunningRis
from deploy.triton.bundled import BundledTriton
from middleware.intake.protocols import BUNDLED
from tests.charts import REAL_STUDY, REAL_STUDY_UID, real_chart
from tests.commands import CLI, ROOT, Ended, assert_no_result, run_wetread, write_config
from tests.fixtures.triton_truth import Fault, build_truth_repository
from tests.fixtures.triton_truth.study import RealStudy
from tests.proxy import open_proxy

FAILED, UNUSABLE, UNDELIVERED = 1, 4, 5
QUICK = "retry: {attempts: 3, first_wait_s: 0.05, longest_wait_s: 0.2}"


def process(folder: Path, config: list[str], *more: object, source: object = REAL_STUDY) -> Ended:
    write_config(folder, [QUICK, f"data_dir: {folder}/data", *config])
    return run_wetread(folder, "process", source, "--out", folder / "out", *more, timeout_s=90)


def said(ended: Ended, code: int, *words: str) -> None:
    assert ended.code == code, ended.said
    for each in words:
        assert each in ended.err, ended.err
    assert len(ended.err.strip().splitlines()) <= 8


def trace(folder: Path) -> Any:
    return json.loads((folder / "out" / "trace.json").read_text(encoding="utf-8"))


def delivery_states(folder: Path) -> dict[str, str]:
    """`destination/artifact` to state."""
    return {f"{d['destination']}/{d['artifact']}": d["state"] for d in trace(folder)["deliveries"]}


# Triton


FAULTS: dict[Fault, str] = {
    "wrong_shape": "zones",
    "wrong_dtype": "output gland is FP32, expected UINT8",
    "nan": "scores",
    "nan_confidence": "scores",
    "infinite": "scores holds",
    "raising": "the model fails on purpose",
}


@pytest.fixture(scope="module")
def faulty_triton(tmp_path_factory: pytest.TempPathFactory, truth: RealStudy) -> Iterator[str]:
    """One Triton with a model for each fault, under the fault's name."""
    models = tmp_path_factory.mktemp("faulty")
    masks = (truth.gland, truth.zones, truth.lesion)
    for fault in FAULTS:
        build_truth_repository(models, *masks, fault=fault, name=fault)
    build_truth_repository(models, *masks, fault="slow", sleep_s=1.5, name="slow")
    build_truth_repository(models, *masks, fault="empty", name="empty")
    build_truth_repository(models, *masks, name="newer", version=2)
    with BundledTriton(models) as server:
        yield server.grpc_url


def protocol_of_model(folder: Path, model: str) -> str:
    """The bundled protocol with another model's name, as a setting."""
    text = (BUNDLED / "prostate_mri.yaml").read_text(encoding="utf-8")
    (folder / "protocols").mkdir()
    (folder / "protocols" / "p.yaml").write_text(text.replace("name: prostate_reference", f"name: {model}"))
    return f"protocols_dir: {folder}/protocols"


def failed(folder: Path, ended: Ended, *words: str, within_s: float) -> None:
    said(ended, FAILED, "A system did not do its part", *words)
    assert_no_result(folder / "out", trace=True)
    assert trace(folder)["state"] == "failed"
    assert ended.seconds < within_s


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_whose_answer_cannot_be_used(fault: Fault, tmp_path: Path, faulty_triton: str) -> None:
    ended = process(tmp_path, [protocol_of_model(tmp_path, fault), f"triton: {{url: '{faulty_triton}'}}"])
    failed(tmp_path, ended, FAULTS[fault], "model", within_s=30)


def test_a_model_that_is_slow(tmp_path: Path, faulty_triton: str) -> None:
    config = [protocol_of_model(tmp_path, "slow"), f"triton: {{url: '{faulty_triton}', deadline_s: 0.3}}"]
    failed(tmp_path, process(tmp_path, config), "no answer within 0.3 s", "after 3 attempts", within_s=20)


def test_a_model_of_another_version(tmp_path: Path, faulty_triton: str) -> None:
    config = [protocol_of_model(tmp_path, "newer"), f"triton: {{url: '{faulty_triton}'}}"]
    failed(tmp_path, process(tmp_path, config), "newer version 1", within_s=20)


def test_a_model_that_there_is_not(tmp_path: Path, faulty_triton: str) -> None:
    config = [protocol_of_model(tmp_path, "absent"), f"triton: {{url: '{faulty_triton}'}}"]
    failed(tmp_path, process(tmp_path, config), "absent", within_s=20)


def test_a_model_that_finds_nothing_is_a_result(tmp_path: Path, faulty_triton: str) -> None:
    config = [protocol_of_model(tmp_path, "empty"), f"triton: {{url: '{faulty_triton}'}}"]
    assert process(tmp_path, config).code == 0
    findings = json.loads((tmp_path / "out" / "findings.json").read_text(encoding="utf-8"))
    assert [f["tracking_id"] for f in findings["findings"]] == ["gland"]


def test_triton_down(tmp_path: Path) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    failed(tmp_path, process(tmp_path, [], "--triton", nobody), "triton", nobody, "not available", within_s=15)


def test_triton_that_listens_and_says_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        config = [f"triton: {{url: '{url}', control_timeout_s: 0.5, connect_timeout_s: 0.5}}"]
        failed(tmp_path, process(tmp_path, config), url, within_s=15)


# EHR


@pytest.fixture
def small_ehr(tmp_path: Path) -> Iterator[RunningEhr]:
    """An in-memory EHR of this test alone, empty."""
    with start_fallback(tmp_path / "ehr") as server:
        yield server


def load(ehr: RunningEhr, chart: dict[str, Any]) -> None:
    httpx.post(ehr.url, json=chart, trust_env=False).raise_for_status()


def with_ehr(folder: Path, ehr: RunningEhr, triton: str) -> Ended:
    return process(folder, [f"ehr: {{url: '{ehr.url}'}}", f"triton: {{url: '{triton}'}}"])


def reports_in(ehr: RunningEhr) -> list[Any]:
    bundle = httpx.get(f"{ehr.url}/DiagnosticReport", trust_env=False).json()
    return [e["resource"] for e in bundle.get("entry", [])]


def test_an_ehr_without_the_patient(tmp_path: Path, small_ehr: RunningEhr, truth_triton: str) -> None:
    load(small_ehr, real_chart(patient_id="SOMEONE-ELSE"))
    said(with_ehr(tmp_path, small_ehr, truth_triton), UNUSABLE, "Held", "no single patient")
    assert_no_result(tmp_path / "out", trace=True)
    assert trace(tmp_path)["state"] == "held"
    assert reports_in(small_ehr) == []


def test_an_order_of_another_patient(tmp_path: Path, small_ehr: RunningEhr, truth_triton: str) -> None:
    """The accession number of the images belongs to someone else: nothing of that order may be used."""
    load(small_ehr, real_chart(accession="ANOTHER"))
    load(small_ehr, real_chart(patient_id="SOMEONE-ELSE"))
    ended = with_ehr(tmp_path, small_ehr, truth_triton)
    said(ended, UNUSABLE, "Held", "the order of this accession number belongs to another patient")
    assert reports_in(small_ehr) == []


def test_an_order_that_was_revoked(tmp_path: Path, small_ehr: RunningEhr, truth_triton: str) -> None:
    chart = real_chart()
    order = next(e["resource"] for e in chart["entry"] if e["resource"]["resourceType"] == "ServiceRequest")
    order["status"] = "revoked"
    load(small_ehr, chart)
    said(with_ehr(tmp_path, small_ehr, truth_triton), UNUSABLE, "Held", "accession number is revoked")


def blanks(folder: Path) -> str:
    report = (folder / "out" / "report.txt").read_text(encoding="utf-8")
    return re.sub(r"\s+", " ", report.partition("LEFT BLANK")[2].partition("WHERE THE MARKS")[0])


def test_an_ehr_without_a_psa(tmp_path: Path, small_ehr: RunningEhr, truth_triton: str) -> None:
    load(small_ehr, real_chart(psa_ng_ml=()))
    ended = with_ehr(tmp_path, small_ehr, truth_triton)
    assert ended.code == 0, ended.said
    assert "PSA density: no usable PSA in the context" in blanks(tmp_path)
    assert "psa_density" not in (tmp_path / "out" / "findings.json").read_text(encoding="utf-8")
    assert len(reports_in(small_ehr)) == 1


def test_a_psa_that_is_too_old(tmp_path: Path, small_ehr: RunningEhr, truth_triton: str) -> None:
    load(small_ehr, real_chart(psa_ng_ml=(13.0,), study_date=date(2009, 7, 7)))
    ended = with_ehr(tmp_path, small_ehr, truth_triton)
    assert ended.code == 0, ended.said
    assert "the latest PSA (2009-06-30) is 737 days old, 365 are allowed" in blanks(tmp_path)
    assert "psa_density" not in (tmp_path / "out" / "findings.json").read_text(encoding="utf-8")


def test_a_psa_of_another_patient(tmp_path: Path, small_ehr: RunningEhr, truth_triton: str) -> None:
    load(small_ehr, real_chart(psa_ng_ml=()))
    load(small_ehr, real_chart(patient_id="SOMEONE-ELSE", accession="ANOTHER"))
    assert with_ehr(tmp_path, small_ehr, truth_triton).code == 0
    assert "PSA density: no usable PSA in the context" in blanks(tmp_path)


def test_an_ehr_that_is_down(tmp_path: Path, truth_triton: str) -> None:
    config = [f"ehr: {{url: 'http://127.0.0.1:{free_port()}/fhir'}}", f"triton: {{url: '{truth_triton}'}}"]
    failed(tmp_path, process(tmp_path, config), "asking the EHR", "no connection", within_s=15)


def test_an_ehr_that_refuses_the_result(tmp_path: Path, small_ehr: RunningEhr, truth_triton: str) -> None:
    load(small_ehr, real_chart())
    outcome = {
        "resourceType": "OperationOutcome",
        "issue": [{"severity": "error", "code": "invalid", "diagnostics": "no"}],
    }

    def refuse(method: str, path: str, body: bytes) -> Response | None:
        posted = method == "POST" and path.rstrip("/") == "fhir"
        return Response(json.dumps(outcome), 422, {"content-type": "application/fhir+json"}) if posted else None

    with open_proxy(small_ehr.url.removesuffix("/fhir")) as proxy:
        proxy.judge = refuse
        config = [f"ehr: {{url: '{proxy.url}/fhir'}}", f"triton: {{url: '{truth_triton}'}}"]
        said(process(tmp_path, config), UNDELIVERED, "fhir-bundle.json to ehr is dead", "422")
        assert len(proxy.posts()) == 1
    assert (tmp_path / "out" / "report.txt").exists()


# RIS


def with_ris(folder: Path, port: int, triton: str, extra: str = "") -> Ended:
    ris = f"ris: {{host: 127.0.0.1, port: {port}, ack_timeout_s: 0.7{extra}}}"
    return process(folder, [ris, f"triton: {{url: '{triton}'}}"])


@pytest.mark.parametrize(
    ("behaviour", "state", "words"),
    [
        (Behaviour.ERROR, "dead", "(AE)"),
        (Behaviour.REJECT, "dead", "(AR)"),
        (Behaviour.SILENT, "ambiguous", "not answered within ack_timeout_s=0.7"),
        (Behaviour.CLOSE, "ambiguous", "the connection ended"),
        (Behaviour.WRONG_ID, "ambiguous", "another"),
        (Behaviour.GARBAGE, "ambiguous", "not answered"),
    ],
)
def test_a_ris_that_does_not_accept(
    behaviour: Behaviour, state: str, words: str, tmp_path: Path, ris: RunningRis, truth_triton: str
) -> None:
    before = len(ris.received())
    ris.behave(behaviour)
    ended = with_ris(tmp_path, ris.port, truth_triton)
    said(ended, UNDELIVERED, f"oru.hl7 to ris is {state}", words)
    assert delivery_states(tmp_path) == {"ris/oru.hl7": state}
    assert len(ris.received()) - before == 1, "a RIS that may not drop duplicates gets it once"
    assert (tmp_path / "out" / "report.txt").exists()


def test_a_silent_ris_that_drops_duplicates_gets_the_same_message_again(
    tmp_path: Path, ris: RunningRis, truth_triton: str
) -> None:
    before = len(ris.received())
    ris.behave(Behaviour.SILENT, times=1)
    ended = with_ris(tmp_path, ris.port, truth_triton, ", duplicate_safe: true")
    assert ended.code == 0, ended.said
    first, second = ris.received()[before:]
    assert first.text == second.text
    assert second.duplicate


def test_a_ris_that_is_down(tmp_path: Path, truth_triton: str) -> None:
    ended = with_ris(tmp_path, free_port(), truth_triton)
    said(ended, UNDELIVERED, "oru.hl7 to ris is retrying", "no connection", "is left to `wetread serve`")


# PACS


def test_a_pacs_that_is_down(tmp_path: Path, truth_triton: str) -> None:
    config = [f"pacs: {{url: 'http://127.0.0.1:{free_port()}/dicom-web'}}", f"triton: {{url: '{truth_triton}'}}"]
    ended = process(tmp_path, config, source=REAL_STUDY_UID)
    failed(tmp_path, ended, "fetching the images", "pacs", within_s=15)


def test_a_study_that_the_pacs_does_not_have(tmp_path: Path, orthanc: RunningOrthanc, truth_triton: str) -> None:
    config = [f"pacs: {{url: '{orthanc.dicomweb_url}'}}", f"triton: {{url: '{truth_triton}'}}"]
    failed(tmp_path, process(tmp_path, config, source="1.2.3.4.5"), "1.2.3.4.5", within_s=15)


def test_a_pacs_that_refuses_one_instance(
    tmp_path: Path, orthanc: RunningOrthanc, ris: RunningRis, small_ehr: RunningEhr, truth_triton: str
) -> None:
    """The SR is refused with 409: it is dead, and everything else arrives, in the PACS and elsewhere."""
    load(small_ehr, real_chart())

    def refuse_sr(method: str, path: str, body: bytes) -> Response | None:
        if method != "POST" or b"1.2.840.10008.5.1.4.1.1.88.34" not in body[:2000]:
            return None
        uid = re.search(rb"\x08\x00\x18\x00UI..([0-9.]+)", body, re.DOTALL)
        assert uid
        failed_one = {
            "00081150": {"vr": "UI", "Value": ["1.2.840.10008.5.1.4.1.1.88.34"]},
            "00081155": {"vr": "UI", "Value": [uid[1].decode()]},
            "00081197": {"vr": "US", "Value": [0x0122]},
        }
        answer = {"00081198": {"vr": "SQ", "Value": [failed_one]}}
        return Response(json.dumps(answer), 409, {"content-type": "application/dicom+json"})

    with open_proxy(orthanc.http_url) as proxy:
        proxy.judge = refuse_sr
        config = [
            f"pacs: {{url: '{proxy.url}/dicom-web'}}",
            f"ehr: {{url: '{small_ehr.url}'}}",
            f"ris: {{host: 127.0.0.1, port: {ris.port}}}",
            f"triton: {{url: '{truth_triton}'}}",
        ]
        ended = process(tmp_path, config)
    said(ended, UNDELIVERED, "sr.dcm to pacs is dead", "refused by the PACS")
    states = delivery_states(tmp_path)
    assert states.pop("pacs/sr.dcm") == "dead"
    assert len(states) == 5
    assert set(states.values()) == {"delivered"}
    seg = pydicom.dcmread(tmp_path / "out" / "seg.dcm", stop_before_pixels=True)
    found = httpx.get(f"{orthanc.dicomweb_url}/studies/{seg.StudyInstanceUID}/instances", trust_env=False).json()
    assert str(seg.SOPInstanceUID) in {i["00080018"]["Value"][0] for i in found}


# The machine itself


@pytest.mark.parametrize("limit_kib", [2, 300, 600])
def test_a_disk_that_is_full(limit_kib: int, tmp_path: Path, truth_triton: str) -> None:
    """A limit on the size of files stands for a full disk: every write above it fails as one on a full disk does."""
    write_config(tmp_path, [QUICK])
    command = ["prlimit", f"--fsize={limit_kib * 1024}", *CLI, "process", str(REAL_STUDY), "--out", "out"]
    (tmp_path / "tmp").mkdir()
    environment = {
        "PATH": "/usr/bin:/bin",
        "TMPDIR": str(tmp_path / "tmp"),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [*command, "--triton", truth_triton], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == FAILED, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.strip()
    left = {p.name for p in (tmp_path / "out").rglob("*")}
    assert left <= {"trace.json"}
    assert list((tmp_path / "tmp").iterdir()) == []
