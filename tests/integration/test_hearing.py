"""The running service hears HL7: kept before it is answered, answered as asked, and what it sets in motion."""

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hl7
import pytest
from hl7.client import MLLPClient
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from sqlmodel import Session, select

from deploy.hospital.process import LOOPBACK, free_port
from mappings.model.study import PatientIdentity, Study
from middleware.intake.identity import find_heard_disagreements
from middleware.store.heard import HeardMessage, OrderRecord, PatientRecord
from middleware.store.hearing import HearingStore
from middleware.store.queries import Store, open_engine
from tests.crash.small_study import Copy, SmallStudy
from tests.dicom_sources import build_sources
from tests.hl7_inbox import Inbox, order_segments, write_message, write_order
from tests.serving import Service

CANARIES = ("Canary", "Karla", "MRN-CANARY", "19610203")


class Listening:
    """The service, its HL7 port, its folder in the place of a PACS, and its store."""

    def __init__(self, folder: Path) -> None:
        self.hl7_port = free_port()
        self.pacs = folder / "pacs"
        self.pacs.mkdir()
        self.service = Service(
            folder / "service",
            {
                "pacs": {"folder": str(self.pacs)},
                "triton": {"url": f"{LOOPBACK}:{free_port()}"},
                "retry": {"attempts": 1, "first_wait_s": 0.1},
                "hl7_listener": {"port": self.hl7_port},
                "completeness": {"quiet_s": 0.5, "longest_wait_s": 1.0, "look_every_s": 0.2},
            },
        )
        self.service.start("tests.hearing_service:main")
        self.engine = open_engine(f"sqlite:///{self.service.data_dir}/wetread.sqlite")
        self.heard = HearingStore(self.engine)
        self.store = Store(self.engine)

    def send(self, raw: bytes) -> hl7.Message:
        """Send one message with python-hl7's client; the answer, read by python-hl7."""
        with MLLPClient(LOOPBACK, self.hl7_port) as client:
            answer: bytes = client.send_message(raw)
        return hl7.parse(answer.strip(b"\x0b\x1c\r").decode())

    def send_ok(self, raw: bytes) -> None:
        assert str(self.send(raw).segment("MSA")[1]) == "AA"

    def rows(self, control_id: str) -> list[HeardMessage]:
        with Session(self.engine) as session:
            return list(session.exec(select(HeardMessage).where(HeardMessage.control_id == control_id)))

    def applied(self, control_id: str) -> HeardMessage:
        """The only message of that control id, once it is no longer `received`."""
        (row,) = until(lambda: [row for row in self.rows(control_id) if row.state != "received"])
        assert isinstance(row, HeardMessage)
        return row

    def events(self, study_uid: str) -> list[str]:
        """Keys of the events that made the study's only job."""
        (job,) = until(lambda: self.store.jobs_of_study(study_uid))
        return [event.idempotency_key for event in self.store.events_of_job(job.job_id)]

    def end_of(self, study_uid: str) -> Any:
        """The study's only job once its reading has ended."""
        return until(
            lambda: next(
                (j for j in self.store.jobs_of_study(study_uid) if j.state not in ("waiting", "accepted", "reading")),
                None,
            )
        )


def until(look: Callable[[], Any], within_s: float = 20.0) -> Any:
    """What `look` gives as soon as it is anything."""
    deadline = time.monotonic() + within_s
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.03)
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Listening]:
    made = Listening(tmp_path_factory.mktemp("hearing"))
    yield made
    assert made.service.stop() == 0, made.service.log()[-2000:]
    assert not any(canary in made.service.log() for canary in CANARIES)
    assert "Traceback" not in made.service.log()


def with_header(raw: bytes, **fields: str) -> bytes:
    """The message with MSH-n set to what `fn` says."""
    header, rest = raw.split(b"\r", 1)
    values = header.decode().split("|")
    for name, value in fields.items():
        number = int(name.removeprefix("f"))
        values += [""] * (number - len(values))
        values[number - 1] = value
    return "|".join(values).encode() + b"\r" + rest


def converse(port: int, *frames: bytes, quiet_s: float = 1.0) -> list[list[str]]:
    """Every MSA (its fields) that comes back on one connection, until it is quiet for so long."""
    received = b""
    with socket.create_connection((LOOPBACK, port), timeout=quiet_s) as connection:
        for frame in frames:
            connection.sendall(b"\x0b" + frame + b"\x1c\r")
        try:
            while chunk := connection.recv(65536):
                received += chunk
        except TimeoutError:
            pass
    lines = received.decode("latin-1").replace("\x0b", "\r").split("\r")
    return [line.split("|") for line in lines if line.startswith("MSA")]


# Answers


@pytest.mark.parametrize(("kind", "control_id"), [("ORM^O01", "k1"), ("OMG^O19", "k2"), ("OMI^O23", "k3")])
def test_order_is_kept_and_accepted(site: Listening, kind: str, control_id: str) -> None:
    raw = write_message(kind, control_id, *order_segments("NW", (f"P-{control_id}", "", "", "")), patient="MRN-CANARY")
    answer = site.send(raw)
    (row,) = site.rows(control_id)  # committed by the time of the answer
    assert (str(answer.segment("MSA")[1]), str(answer.segment("MSA")[2])) == ("AA", control_id)
    assert row.raw == raw
    assert site.applied(control_id).state == "applied"


def test_resend_is_answered_and_kept_once(site: Listening) -> None:
    raw = write_order("resent", "NW", ("P-resent", "", "", ""))
    for _ in range(3):
        site.send_ok(raw)
    (row,) = site.rows("resent")
    assert row.repeats == 2


def test_resend_on_one_connection_is_kept_once(site: Listening) -> None:
    raw = write_order("joined", "NW", ("P-joined", "", "", ""))
    assert converse(site.hl7_port, raw, raw) == [["MSA", "AA", "joined"]] * 2
    (row,) = site.rows("joined")
    assert row.repeats == 1


def test_control_id_with_other_content_is_kept_with_a_note(site: Listening) -> None:
    for control in ("NW", "CA"):
        site.send_ok(write_order("reused", control, ("P-reused", "", "", "")))
    until(lambda: {row.state for row in site.rows("reused")} == {"applied"})
    first, second = site.rows("reused")
    assert (first.notes, second.notes) == ([], ["this control id was used before with other content"])


@pytest.mark.parametrize(
    ("raw", "control_id"),
    [
        (b"this is no HL7 at all MRN-CANARY", ""),
        (b"", ""),
        (bytes(range(256)), ""),
        (write_order("b2", "NW", ("P", "", "", "")).replace(b"^~\\&", b"^^^^"), "b2"),
        (with_header(write_order("", "NW", ("P", "", "", "")), f10=""), ""),
        (with_header(write_order("b3", "NW", ("P", "", "", "")), f12="9.9"), "b3"),
    ],
    ids=["text", "empty", "binary", "broken MSH-2", "empty MSH-10", "unknown version"],
)
def test_what_cannot_be_read_is_refused_with_the_reason_and_kept(site: Listening, raw: bytes, control_id: str) -> None:
    before = site.heard.count_by_state().get("unreadable", 0)
    with MLLPClient(LOOPBACK, site.hl7_port) as client:
        text = client.send_message(raw).strip(b"\x0b\x1c\r").decode("latin-1")
    lines = {line[:3]: line.split("|") for line in text.split("\r") if line}
    assert lines["MSA"][1] == "AR"
    assert lines["MSA"][2] == control_id
    assert lines["ERR"][4] == "E"
    assert lines["ERR"][8]
    assert not any(canary in text for canary in CANARIES)
    assert site.heard.count_by_state()["unreadable"] == before + 1


@pytest.mark.parametrize("processing_id", ["T", "D", ""])
def test_test_feed_is_refused_where_it_is_not_allowed(site: Listening, processing_id: str) -> None:
    answer = site.send(with_header(write_order(f"t{processing_id}", "NW", ("P-t", "", "", "")), f11=processing_id))
    assert str(answer.segment("MSA")[1]) == "AR"
    assert str(answer.segment("ERR")[3][0][0]) == "202"
    assert site.rows(f"t{processing_id}") == []


@pytest.mark.parametrize(
    ("accept", "application", "codes"),
    [
        ("AL", "AL", ["CA", "AA"]),
        ("AL", "NE", ["CA"]),
        ("NE", "AL", ["AA"]),
        ("NE", "NE", []),
        ("ER", "ER", []),
        ("SU", "SU", ["CA", "AA"]),
    ],
)
def test_enhanced_mode_answers_what_is_asked_for(
    site: Listening, accept: str, application: str, codes: list[str]
) -> None:
    control_id = f"enhanced-{accept}-{application}"
    raw = write_order(control_id, "NW", (f"P-{control_id}", "", "", ""))
    found = converse(site.hl7_port, with_header(raw, f15=accept, f16=application), quiet_s=0.7)
    assert found == [["MSA", code, control_id] for code in codes]
    assert site.applied(control_id).state == "applied"


def test_latin_1_under_utf_8_is_read_with_a_note(site: Listening) -> None:
    raw = write_message("ADT^A04", "latin", patient="LAT-1").replace(b"Karla", "Jürgen".encode("latin-1"))
    site.send_ok(with_header_bytes(raw, "UNICODE UTF-8"))
    row = site.applied("latin")
    assert row.state == "applied"
    assert any("UTF-8" in note for note in row.notes)
    with Session(site.engine) as session:
        (patient,) = session.exec(select(PatientRecord).where(PatientRecord.patient_id == "LAT-1"))
    assert patient.name == "Canary^Jürgen"


def with_header_bytes(raw: bytes, charset: str) -> bytes:
    header, rest = raw.split(b"\r", 1)
    return header + b"||||||" + charset.encode() + b"\r" + rest


# Large messages


def test_50000_observations_and_2_megabytes_in_one_do_not_stop_the_service(site: Listening) -> None:
    obr = "OBR|1|P-big|F-big|MRPRO|||||||||||||||||||||F"
    many = (f"OBX|{n}|TX|18782-3^^LN||line {n}||||||F" for n in range(50_000))
    for control_id, segments in (("many", many), ("long", ("OBX|1|TX|18782-3^^LN||" + "x" * 2_000_000 + "||||||F",))):
        raw = write_message("ORU^R01", control_id, obr.replace("-big", f"-{control_id}"), *segments)
        began = time.monotonic()
        site.send_ok(raw)
        assert time.monotonic() - began < 10
        asked = time.monotonic()
        assert site.service.answers()
        assert time.monotonic() - asked < 2
        assert site.applied(control_id).state == "applied"
        assert site.rows(control_id)[0].raw == raw


# What is set in motion


def add_study(site: Listening, name: str, **changes: str) -> str:
    """Put a study of one instance, which no protocol reads, into the PACS; its UID."""
    uid = f"1.2.826.0.1.{abs(hash(name)) % 10**9}.{time.time_ns()}"
    (ds,) = build_sources(
        (1, 8, 8), StudyInstanceUID=uid, PatientID="MRN-CANARY", PatientName="Canary^Karla", **changes
    )
    ds.SOPInstanceUID = f"{uid}.1"
    ds.Modality = "US"
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelData = 16, 12, 11, bytes(8 * 8 * 2)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    ds.save_as(site.pacs / f"{name}.dcm", enforce_file_format=True)
    return uid


def complete(site: Listening, control_id: str, accession: str, study_uid: str) -> None:
    numbers = (f"P-{control_id}", "", accession, study_uid)
    site.send_ok(write_order(control_id, "XO", numbers, status="CM", patient="MRN-CANARY"))


def assert_read_once(site: Listening, study_uid: str) -> None:
    until(lambda: site.store.jobs_of_study(study_uid))
    assert site.end_of(study_uid).state == "unmatched"
    keys = site.events(study_uid)
    assert all(key.startswith("order:") and key.endswith(study_uid) for key in keys)
    time.sleep(1.5)  # another look at all orders
    assert site.events(study_uid) == keys
    (job,) = site.store.jobs_of_study(study_uid)
    assert job.facts["run"] <= 1


def test_study_of_a_completed_order_is_read_once_by_its_uid(site: Listening) -> None:
    study_uid = add_study(site, "by-uid", AccessionNumber="OTHER")
    for n in range(3):
        numbers = ("P-uid", "", "A-uid", study_uid)
        site.send_ok(write_order(f"uid-{n}", "XO", numbers, status="CM", patient="MRN-CANARY"))
    assert_read_once(site, study_uid)


def test_study_of_a_completed_order_is_found_by_its_accession_number(site: Listening) -> None:
    study_uid = add_study(site, "by-accession", AccessionNumber="A-acc")
    complete(site, "accession", "A-acc", "")
    assert_read_once(site, study_uid)


@pytest.mark.parametrize("by_uid", [True, False])
def test_order_that_is_complete_before_its_images_are_there(site: Listening, by_uid: bool) -> None:
    study_uid = add_study(site, f"late-{by_uid}", AccessionNumber=f"A-late-{by_uid}")
    (site.pacs / f"late-{by_uid}.dcm").rename(site.pacs.parent / "waiting.dcm")
    complete(site, f"late-{by_uid}", f"A-late-{by_uid}", study_uid if by_uid else "")
    site.applied(f"late-{by_uid}")
    time.sleep(1.5)
    assert site.store.jobs_of_study(study_uid) == []
    (site.pacs.parent / "waiting.dcm").rename(site.pacs / f"late-{by_uid}.dcm")
    assert_read_once(site, study_uid)


def test_wildcard_in_an_accession_number_reads_nothing(site: Listening) -> None:
    study_uid = add_study(site, "wildcard", AccessionNumber="A-wild-1")
    complete(site, "wild-1", "A-wild-*", "")
    complete(site, "wild-2", "*", "")
    site.applied("wild-2")
    time.sleep(1.5)
    assert site.store.jobs_of_study(study_uid) == []


def test_cancelled_order_reads_nothing(site: Listening) -> None:
    study_uid = add_study(site, "cancelled", AccessionNumber="A-cancelled")
    site.send_ok(write_order("cancelled-0", "CA", ("P-cancelled", "", "A-cancelled", ""), patient="MRN-CANARY"))
    site.applied("cancelled-0")
    time.sleep(1.5)
    assert site.store.jobs_of_study(study_uid) == []


def test_order_on_hold_reads_nothing_until_it_is_resumed(site: Listening) -> None:
    study_uid = add_study(site, "not-yet", AccessionNumber="A-not")
    for n, (control, status) in enumerate((("HD", ""), ("SC", "IP"), ("XO", "IP"))):
        site.send_ok(write_order(f"not-{n}", control, ("P-not", "", "A-not", ""), status=status, patient="MRN-CANARY"))
    site.applied("not-2")
    time.sleep(1.5)
    assert site.store.jobs_of_study(study_uid) == []
    site.send_ok(write_order("not-4", "RL", ("P-not", "", "A-not", ""), patient="MRN-CANARY"))
    assert_read_once(site, study_uid)


# What holds


def read_copy(site: Listening, fresh: Copy, *messages: bytes) -> Any:
    """The job of a copy of the phantom that is announced once these messages have been applied."""
    for number, instance in enumerate(fresh.instances):
        (site.pacs / f"{fresh.spec.patient_id}-{number}.dcm").write_bytes(instance)
    for message in messages:
        site.send_ok(message)
    until(lambda: not site.heard.pending())
    site.service.announce(fresh.study_uid)
    return site.end_of(fresh.study_uid)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallStudy:
    return SmallStudy(tmp_path_factory.mktemp("phantom"))


def test_cancelled_order_holds_its_study(site: Listening, small: SmallStudy) -> None:
    fresh = small.copy("cancel")
    patient, numbers = fresh.spec.patient_id, ("P-cancel", "", fresh.spec.accession, "")
    new = write_order("cancel-1", "NW", numbers, patient=patient)
    gone = write_order("cancel-2", "CA", ("P-cancel", "", "", ""), patient=patient)
    job = read_copy(site, fresh, new, gone)
    assert (job.state, job.reasons) == ("held", ["the order of this study is cancelled"])


def test_merged_patient_holds_the_study(site: Listening, small: SmallStudy) -> None:
    fresh = small.copy("merge")
    merge = write_message("ADT^A40", "merge-1", f"MRG|{fresh.spec.patient_id}^^^HOSP", patient="NEW-merge")
    job = read_copy(site, fresh, merge)
    assert job.state == "held"
    (reason,) = job.reasons
    assert "was merged into another one" in reason


def test_order_of_another_patient_holds_the_study(site: Listening, small: SmallStudy) -> None:
    fresh = small.copy("else")
    order = write_order("else-1", "NW", ("P-else", "", fresh.spec.accession, ""), patient="SOMEBODY-ELSE")
    job = read_copy(site, fresh, order)
    assert (job.state, job.reasons) == ("held", ["the order of this study is another patient's"])


@pytest.mark.parametrize(
    ("messages", "reasons"),
    [
        ((), 0),
        ((write_order("a", "NW", ("P1", "", "ACC", "")),), 0),
        ((write_order("a", "CA", ("P1", "", "ACC", "")),), 1),
        ((write_order("a", "DC", ("P1", "", "", "1.2.3")),), 1),
        ((write_order("a", "CA", ("P1", "", "OTHER", "")),), 0),
        ((write_message("ADT^A40", "a", "MRG|4711^^^HOSP", patient="1"),), 1),
        ((write_message("ADT^A40", "a", "MRG|1^^^HOSP", patient="4711"),), 0),
        ((write_order("a", "NW", ("P1", "", "ACC", ""), patient="1"),), 1),
        (
            (
                write_order("a", "NW", ("P1", "", "ACC", ""), patient="1"),
                write_message("ADT^A40", "b", "MRG|1^^^HOSP", patient="4711"),
            ),
            0,
        ),
    ],
)
def test_what_messages_say_against_a_release(messages: tuple[bytes, ...], reasons: int) -> None:
    inbox = Inbox()
    for raw in messages:
        assert inbox.hear(raw).state == "applied"
    study = Study("1.2.3", PatientIdentity("4711"), (), accession_number="ACC")
    found = find_heard_disagreements(study, inbox.store)
    assert len(found) == reasons
    assert "4711" not in " ".join(found)


def test_metrics_count_messages_and_name_nobody(site: Listening) -> None:
    raw = write_order("metrics", "NW", ("P-metrics", "", "", ""), patient="MRN-CANARY")
    for _ in range(2):
        site.send_ok(raw)
    site.send(b"no HL7: MRN-CANARY")
    metrics = site.service.http.get("/metrics").text
    for outcome in ("new", "repeated", "unreadable"):
        assert f'wetread_events_total{{outcome="{outcome}",source="hl7"}}' in metrics
    assert not any(canary in metrics for canary in CANARIES)


# Restart


def test_kept_messages_are_applied_after_a_restart(site: Listening) -> None:
    for n in range(20):
        site.send_ok(write_order(f"again-{n}", "NW", (f"P-again-{n}", "", "", "")))
    site.service.kill()
    site.service.start("tests.hearing_service:main")
    until(lambda: not site.heard.pending())
    with Session(site.engine) as session:
        orders = session.exec(select(OrderRecord).where(OrderRecord.placer_order_number.startswith("P-again-"))).all()
    assert len(orders) == 20
    site.send_ok(write_order("again-0", "NW", ("P-again-0", "", "", "")))
