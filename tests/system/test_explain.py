"""`wetread explain` and `protocols dry-run --past` on what a running service keeps."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from hl7.client import MLLPClient
from sqlalchemy import text
from sqlmodel import Session

from deploy.hospital.chart import chart_bundle
from deploy.hospital.ehr import start_fallback
from deploy.hospital.process import LOOPBACK, free_port
from middleware.intake.protocols import BUNDLED
from middleware.store.queries import open_engine
from middleware.store.tables import Decision
from tests.commands import Ended, run_wetread, write_config
from tests.crash.small_study import Copy, SmallStudy
from tests.hl7_inbox import write_order
from tests.serving import Service

RULES = """when:
  - {expression: "labs.psa >= 4.0 || order.priority == 'stat'", say: PSA under 4 ng/mL and not urgent}
set_aside:
  - {expression: 'patient.id.startsWith("CRASH-qa")', say: a QA patient}

roles:
"""
PROTOCOL = (BUNDLED / "prostate_mri.yaml").read_text(encoding="utf-8").replace("roles:\n", RULES, 1)
ORDERED, TABLES = "2.25.4711", ("study_job", "study_event", "step_run", "delivery", "order_record", "heard_message")


@dataclass
class Site:
    """The running service, its folder in the place of a PACS, and the studies that it was told of, by name."""

    service: Service
    folder: Path
    studies: dict[str, Copy]

    def run(self, *arguments: object, **more: str) -> Ended:
        """A command beside the service, on its settings."""
        config = str(self.service.folder / "wetread.yaml")
        return run_wetread(self.folder / "beside", *arguments, WETREAD_CONFIG=config, **more)

    def explain(self, study_uid: str) -> str:
        """What is told of a study, on one line."""
        ended = self.run("explain", study_uid)
        assert ended.code == 0, ended.said
        return " ".join(ended.out.split())

    def replay(self, *options: object, **changes: str) -> str:
        """What a dry run tells with these changes (old text: new text) to the protocol."""
        if changes:
            changed = PROTOCOL
            for old, new in changes.items():
                assert old in changed
                changed = changed.replace(old, new, 1)
            (self.folder / "tried.yaml").write_text(changed, encoding="utf-8")
            options = (*options, "--protocol", self.folder / "tried.yaml")
        ended = self.run("protocols", "dry-run", "--past", "1", *options)
        assert ended.code == 0, ended.said
        return " ".join(ended.out.split())

    def counts(self) -> dict[str, Any]:
        """Rows of each table, and the files of the artifact store."""
        with open_engine(f"sqlite:///{self.service.data_dir}/wetread.sqlite").connect() as connection:
            rows = {name: connection.execute(text(f"SELECT count(*) FROM {name}")).scalar() for name in TABLES}
        return {**rows, "artifacts": sorted(p.name for p in (self.service.data_dir / "artifacts").rglob("*"))}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Four studies: `high` and `low` PSA, a `qa` patient, and `mute`, for which the EHR did not answer. No inference
    server answers, so a reading ends after the rules."""
    folder = tmp_path_factory.mktemp("explain")
    study = SmallStudy(folder / "phantom")
    studies = {name: study.copy(name) for name in ("high", "low", "qa", "mute")}
    for name, copy in studies.items():
        (folder / "pacs" / name).mkdir(parents=True)
        for number, instance in enumerate(copy.instances):
            (folder / "pacs" / name / f"{number}.dcm").write_bytes(instance)
    (folder / "protocols").mkdir()
    (folder / "protocols" / "prostate_mri.yaml").write_text(PROTOCOL, encoding="utf-8")
    with start_fallback(folder) as ehr:
        hl7_port = free_port()
        settings = {
            "pacs": {"folder": str(folder / "pacs")},
            "ehr": {"url": ehr.url},
            "protocols_dir": str(folder / "protocols"),
            "triton": {"url": f"{LOOPBACK}:{free_port()}"},
            "retry": {"attempts": 1, "first_wait_s": 0.1},
            "hl7_listener": {"port": hl7_port},
        }
        made = Site(Service(folder / "service", settings), folder, studies)
        made.service.start()
        charts = {"high": (9.4, 13.0), "low": (1.5, 2.5), "qa": (13.0,)}
        for name, psa in charts.items():
            chart = chart_bundle(studies[name].spec, psa_ng_ml=psa)
            httpx.post(ehr.url, json=chart, trust_env=False, timeout=30).raise_for_status()
            made.service.announce(studies[name].study_uid)
        for name in charts:
            made.service.wait_until_settled(studies[name].study_uid)
        for raw in (
            write_order("ordered", "NW", ("P-1", "", "A-1", ORDERED)),
            write_order("conflict", "XO", ("P-2", "", "A-1", "2.25.4712")),
        ):
            with MLLPClient(LOOPBACK, hl7_port) as client:
                client.send_message(raw)
        nobody = f"http://{LOOPBACK}:{free_port()}"
        made.run("process", studies["mute"].study_uid, "--out", folder / "out", WETREAD_EHR__URL=nobody)
        yield made
        assert made.service.stop() == 0, made.service.log()[-2000:]
        assert "Traceback" not in made.service.log()


def test_each_rule_is_told_with_the_value_that_decided(site: Site) -> None:
    told = site.explain(site.studies["high"].study_uid)
    assert "is failed, revision 1" in told
    assert "with the EHR's context" in told
    assert "protocol prostate_mri version 1 reads it" in told
    assert re.search(r"✓ match modality any_of \[MR\] modality is MR ", told)
    assert re.search(r"✓ when labs\.psa >= 4\.0 .*labs\.psa is 13 ng/mL", told)
    assert re.search(r"✓ set_aside patient\.id\.starts.*patient\.id is stated, not shown", told)
    assert "role t2w, T2-weighted axial: 4 t2_tse_tra" in told
    assert "No delivery was planned." in told


def test_a_rule_that_refused_is_marked(site: Site) -> None:
    told = site.explain(site.studies["low"].study_uid)
    assert "because prostate_mri: PSA under 4 ng/mL and not urgent: `labs.psa >= 4.0" in told
    assert "prostate_mri version 1 does not read it" in told
    assert re.search(r"✗ when labs\.psa >= 4\.0 .*labs\.psa is 2\.5 ng/mL", told)


def test_a_qa_patient_is_set_aside_before_the_ehr_is_asked(site: Site) -> None:
    told = site.explain(site.studies["qa"].study_uid)
    assert "by the images alone, before the EHR was asked" in told
    assert re.search(r"✗ set_aside .*set aside: a QA patient", told)
    assert re.search(r"\? when .*labs\.psa is not known yet", told)
    assert "context" not in re.findall(r"│ (\w+) │", told)


def test_a_changed_file_is_compared_with_the_one_that_was_applied(site: Site) -> None:
    file = site.folder / "protocols" / "prostate_mri.yaml"
    changed = PROTOCOL.replace("labs.psa >= 4.0", "labs.psa >= 20.0").replace('version: "1"', 'version: "2"', 1)
    try:
        file.write_text(changed, encoding="utf-8")
        told = site.explain(site.studies["high"].study_uid)
    finally:
        file.write_text(PROTOCOL, encoding="utf-8")
    assert "protocol prostate_mri version 1 reads it" in told
    assert re.search(r"✓ when labs\.psa >= 4\.0", told)
    assert "the file was changed since, now version 2:" in told
    assert '- line 12: version: "1" + line 12: version: "2"' in told
    assert "By today's files the study would be: unmatched" in told
    assert "`labs.psa >= 20.0 || order.priority == 'stat'` does not hold (labs.psa is 13 ng/mL" in told


def test_what_people_decided_is_told(site: Site) -> None:
    uid = site.studies["low"].study_uid
    (job,) = site.service.jobs(uid)
    with Session(open_engine(f"sqlite:///{site.service.data_dir}/wetread.sqlite")) as session:
        at = datetime(2026, 3, 4, 10, 30, tzinfo=UTC)
        session.add(
            Decision(
                decision_id="d", job_id=job["job_id"], person="r.ferrer", action="reject", reason="moved", decided_at=at
            )
        )
        session.commit()
    assert "reject by r.ferrer at 2026-03-04 10:30:00 UTC: moved" in site.explain(uid)


def test_a_study_that_only_an_order_names(site: Site) -> None:
    told = site.explain(ORDERED)
    assert "No reading: HL7 messages name this study" in told
    assert "its study was not found so far" in told
    assert "placer P-1, accession A-1, study 2.25.4711" in told
    assert re.search(r"refused ORM\^O01 of .*control id conflict", told)
    assert "differs from the one known for this order" in told
    assert not any(word in told for word in ("Canary", "Karla", "19610203"))
    assert "Order" not in site.explain("2.25.4712"), "the message was refused: there is no such order"


def test_a_study_that_nothing_names(site: Site) -> None:
    ended = site.run("explain", "1.2.3")
    assert (ended.code, ended.out.strip()) == (2, "Nothing is known of study 1.2.3: no event named it.")


def test_the_same_rules_decide_the_same_and_what_needs_the_context_stays_undecided(site: Site) -> None:
    before = site.counts()
    told = site.replay()
    assert "4 studies of the last day, 0 would differ, 1 cannot be decided (a rule needs the EHR's context" in told
    assert site.studies["mute"].study_uid in told
    assert "labs.psa, order.priority not known yet" in told
    assert not any(site.studies[name].study_uid in told for name in ("high", "low", "qa"))
    assert site.counts() == before


def test_a_changed_rule_shows_the_studies_that_it_changes(site: Site) -> None:
    before = site.counts()
    stricter = site.replay(**{"labs.psa >= 4.0": "labs.psa >= 10.0"})
    assert "0 would differ" in stricter
    stricter = site.replay(**{"labs.psa >= 4.0": "labs.psa >= 20.0"})
    assert "4 studies of the last day, 1 would differ" in stricter
    high = rf"{site.studies['high'].study_uid} then read by prostate_mri version 1; its reading is failed "
    assert re.search(rf"{high}now read by no protocol why prostate_mri, when, now: .*labs\.psa is 13 ng/mL", stricter)
    looser = site.replay(**{"labs.psa >= 4.0": "labs.psa >= 2.0"})
    low = rf"{site.studies['low'].study_uid} then read by no protocol; its reading is unmatched "
    assert re.search(rf"{low}now read by prostate_mri version 1 why .*then: .*labs\.psa is 2\.5 ng/mL", looser)
    adc = 'any_of: [ADC]}\n          - {attribute: description, matches: "(?i)(\\\\b|_)(e?adc|apparent'
    no_adc = site.replay(**{adc: adc.replace("ADC", "NONE").replace("e?adc|apparent", "none")})
    assert "2 would differ, 0 cannot be decided" in no_adc, "no context makes up for a series that is not there"
    assert "roles, now: no series can be the Apparent diffusion coefficient map (adc): series 4" in no_adc
    assert site.counts() == before
    assert "CRASH" not in stricter + looser


def test_all_shows_those_that_stay_the_same_too(site: Site) -> None:
    told = site.replay("--all")
    assert all(copy.study_uid in told for copy in site.studies.values())
    assert told.count("now the same") == 3


def test_another_protocol_beside_those_in_use_takes_only_what_they_leave(site: Site) -> None:
    told = site.replay(**{"name: prostate_mri": "name: z_last", "labs.psa >= 4.0": "labs.psa >= 2.0"})
    assert "1 would differ" in told
    low = rf"{site.studies['low'].study_uid} then read by no protocol; its reading is unmatched "
    assert re.search(rf"{low}now read by z_last version 1 why z_last was not tried then", told)


@pytest.mark.parametrize("options", [(), ("folder", "--past", "1")])
def test_a_folder_or_the_past_and_not_both(site: Site, options: tuple[str, ...]) -> None:
    ended = site.run("protocols", "dry-run", *options)
    assert ended.code == 2
    assert "a folder of DICOM files or --past DAYS, and not both" in ended.err


def test_nothing_kept_is_said_and_nothing_is_made(tmp_path: Path) -> None:
    ended = run_wetread(tmp_path, "protocols", "dry-run", "--past", "30", WETREAD_DATA_DIR=str(tmp_path / "data"))
    assert (ended.code, ended.out.strip()) == (
        2,
        "Nothing to replay: of the last 30 days no study's images are kept.",
    )
    assert not (tmp_path / "data").exists()


def test_a_folder_shows_every_check(site: Site) -> None:
    ended = site.run("protocols", "dry-run", site.folder / "pacs" / "high")
    assert ended.code == 0, ended.said
    assert "? when" in " ".join(ended.out.split())
    assert "This study would be read, if the rules that need the EHR's context let it in." in ended.out
    aside = site.run("protocols", "dry-run", site.folder / "pacs" / "qa")
    assert (aside.code, "set aside: a QA patient" in aside.out) == (3, True)


def test_the_reading_itself_goes_to_the_protocol_whose_rules_let_the_study_in(site: Site, tmp_path: Path) -> None:
    for name, changes in {"a_strict": ("labs.psa >= 4.0", "labs.psa >= 20.0"), "b_other": ("", "")}.items():
        text = PROTOCOL.replace("name: prostate_mri", f"name: {name}", 1).replace(*changes)
        (tmp_path / "protocols").mkdir(exist_ok=True)
        (tmp_path / "protocols" / f"{name}.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "chart.json").write_text(json.dumps(site.studies["high"].chart), encoding="utf-8")
    write_config(tmp_path, [f"protocols_dir: {tmp_path}/protocols", "pacs: {folder: pacs}"])
    shutil.copytree(site.folder / "pacs" / "high", tmp_path / "pacs")
    uid = site.studies["high"].study_uid
    triton = ("--triton", f"{LOOPBACK}:{free_port()}")
    ended = run_wetread(tmp_path, "process", uid, "--out", "out", "--context", "chart.json", *triton)
    assert ended.code == 1, ended.said
    assert "protocol a_strict;" in ended.out, "as far as images tell"
    assert "2 rules let the study in, to be read by protocol b_other" in ended.out
    trace = json.loads((tmp_path / "out" / "trace.json").read_text(encoding="utf-8"))
    assert (trace["protocol"]["name"], trace["steps"][-1]["step"]) == ("b_other", "inference")
    told = " ".join(run_wetread(tmp_path, "explain", uid).out.split())
    assert "protocol a_strict version 1 does not read it" in told
    assert "protocol b_other version 1 reads it" in told
    only = run_wetread(
        tmp_path, "process", uid, "--out", "out", "--context", "chart.json", "--protocol", "a_strict", *triton
    )
    assert (only.code, "a_strict: PSA under 4 ng/mL" in only.err) == (3, True), only.said
    told = " ".join(run_wetread(tmp_path, "explain", uid).out.split())
    assert "protocol b_other" not in told.split("Rules")[1].split("By today")[0]
