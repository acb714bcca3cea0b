"""An order or an imaging study that is made in a real EHR (HAPI) has its study read, without any other trigger; while
the service is down none is missed, and none is read twice."""

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from deploy.hospital.chart import ACCESSION_SYSTEM, MRN_SYSTEM, chart_bundle
from deploy.hospital.ehr import RunningEhr
from deploy.hospital.pacs import RunningOrthanc
from tests.arrivals import Watching, store_in
from tests.crash.small_study import Copy, SmallStudy

TOKEN = "the-token-of-the-callback-1"
Json = dict[str, Any]


class Clinic:
    """A service that hears from the EHR only: nobody watches the PACS, no HL7 comes, nobody asks."""

    def __init__(self, site: Watching, ehr: RunningEhr) -> None:
        self.site = site
        self.http = httpx.Client(base_url=f"{ehr.url}/", timeout=60, trust_env=False)

    def start(self) -> None:
        """Start the service, which may be reached by the EHR from now on."""
        callback = f"{self.site.service.api}/fhir/notifications"
        self.site.start("", WETREAD_EHR_EVENTS__CALLBACK_URL=callback, WETREAD_EHR_EVENTS__TOKEN=TOKEN)

    def bring(self, fresh: Copy) -> None:
        """The images, and the patient's chart without an order: nothing that anybody tells Wetread of."""
        store_in(self.site.orthanc.dicomweb_url, fresh.study_uid, fresh.instances)
        self.http.post("", json=chart_bundle(fresh.spec, with_order=False)).raise_for_status()

    def order(self, fresh: Copy) -> None:
        """The order, alone."""
        resource = {"intent": "order", **self._about(fresh)}
        self._create({"resourceType": "ServiceRequest", "status": "active", **resource})

    def study(self, fresh: Copy) -> None:
        """The ImagingStudy, alone."""
        uid = {"system": "urn:dicom:uid", "value": f"urn:oid:{fresh.study_uid}"}
        about = self._about(fresh)
        about["identifier"] = [uid, *about["identifier"]]
        self._create({"resourceType": "ImagingStudy", "status": "available", **about})

    def _about(self, fresh: Copy) -> Json:
        token = f"{MRN_SYSTEM}|{fresh.spec.patient_id}"
        (entry,) = self.http.get("Patient", params={"identifier": token}).json()["entry"]
        accession = {"type": {"coding": [{"code": "ACSN"}]}, "system": ACCESSION_SYSTEM, "value": fresh.spec.accession}
        return {"identifier": [accession], "subject": {"reference": f"Patient/{entry['resource']['id']}"}}

    def _create(self, resource: Json) -> None:
        answer = self.http.post(resource["resourceType"], json=resource)
        assert answer.status_code == 201, answer.text

    def assert_read_once(self, fresh: Copy) -> None:
        """The study was released by one run, and the EHR has one report of it."""
        job = self.site.settled(fresh.study_uid, within_s=90)
        assert (job.state, job.facts["run"], job.revision) == ("released", 1, 1), job.reasons
        assert {event.source for event in self.site.events(fresh.study_uid)} == {"order"}
        assert self.site.steps(fresh.study_uid).count("fetch") == 1


@pytest.fixture(scope="module")
def clinic(
    tmp_path_factory: pytest.TempPathFactory, orthanc: RunningOrthanc, ehr: RunningEhr, small_triton: str
) -> Iterator[Clinic]:
    site = Watching(
        tmp_path_factory.mktemp("clinic"),
        orthanc,
        pacs_watch=None,
        ehr={"url": ehr.url, "patient_identifier_system": MRN_SYSTEM},
        ehr_events={"callback_url": "http://x/fhir/notifications", "poll_s": 600, "check_s": 600},
        triton={"url": small_triton},
    )
    made = Clinic(site, ehr)
    made.start()
    yield made
    site.stop()


@pytest.mark.parametrize("kind", ["order", "study"])
def test_made_in_the_ehr_it_is_read(clinic: Clinic, small_study: SmallStudy, kind: str) -> None:
    fresh = small_study.copy(f"ehr-{kind}")
    clinic.bring(fresh)
    getattr(clinic, kind)(fresh)
    clinic.assert_read_once(fresh)


def test_order_and_study_are_one_piece_of_work(clinic: Clinic, small_study: SmallStudy) -> None:
    fresh = small_study.copy("ehr-both")
    clinic.bring(fresh)
    clinic.study(fresh)
    clinic.order(fresh)
    clinic.assert_read_once(fresh)
    time.sleep(2)
    clinic.assert_read_once(fresh)


def test_what_is_made_while_the_service_is_down_is_read_once_after_its_start(
    clinic: Clinic, small_study: SmallStudy
) -> None:
    copies = [small_study.copy(f"ehr-down-{n}") for n in range(3)]
    clinic.site.service.kill()
    for number, fresh in enumerate(copies):
        clinic.bring(fresh)
        (clinic.study if number == 1 else clinic.order)(fresh)
    clinic.start()
    for fresh in copies:
        clinic.assert_read_once(fresh)
    clinic.site.service.kill()
    clinic.start()  # what was read is not read again
    time.sleep(3)
    for fresh in copies:
        clinic.assert_read_once(fresh)
