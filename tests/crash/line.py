"""The service with its whole hospital, and what must be in every system once a study has been read."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from connectors.dicomweb.client import DicomwebClient
from connectors.dicomweb.config import DicomwebConfig
from deploy.hospital.ehr import RunningEhr
from deploy.hospital.pacs import RunningOrthanc
from deploy.hospital.ris_process import RunningRis
from tests.crash.small_study import Copy, SmallStudy
from tests.serving import Service

DELIVERIES = {
    ("pacs", "seg"): 1,
    ("pacs", "sr"): 1,
    ("pacs", "key_images"): 2,
    ("ehr", "fhir_bundle"): 1,
    ("ris", "oru"): 1,
}


@dataclass
class Line:
    """The service on one data_dir with its hospital, and the study that is copied."""

    service: Service
    study: SmallStudy
    orthanc: RunningOrthanc
    ehr: RunningEhr
    ris: RunningRis
    arm: Path

    def start(self) -> None:
        """The service, with its points wrapped and none armed."""
        self.arm.unlink(missing_ok=True)
        self.service.start("tests.crash.victim:main", VICTIM_ARM=str(self.arm))

    def stop(self) -> None:
        """The service, in order; its log holds no traceback."""
        assert self.service.stop() == 0, self.service.log()[-2000:]
        assert "Traceback" not in self.service.log()

    def bring(self, name: str) -> Copy:
        """A fresh copy of the study in the PACS, and its patient's chart in the EHR."""
        fresh = self.study.copy(name)

        async def store() -> None:
            pacs = DicomwebClient(DicomwebConfig(url=self.orthanc.dicomweb_url))
            outcomes = await pacs.store(fresh.instances, fresh.study_uid)
            await pacs.aclose()
            assert all(o.stored for o in outcomes)

        asyncio.run(store())
        httpx.post(self.ehr.url, json=fresh.chart, trust_env=False, timeout=30).raise_for_status()
        return fresh

    def faults(self, fresh: Copy) -> list[str]:
        """What is not as it must be at the end, in the service, the PACS, the EHR and the RIS."""
        job = self.service.wait_until_settled(fresh.study_uid)
        planned: dict[tuple[str, str], int] = {}
        for each in job["deliveries"]:
            key = (each["destination"], _kind(each["artifact_name"]))
            planned[key] = planned.get(key, 0) + 1
        found = [f"job is {job['state']}: {job['reasons']}"] if job["state"] != "released" else []
        found += [f"{d['artifact_name']} {d['state']}" for d in job["deliveries"] if d["state"] != "delivered"]
        found += [f"deliveries planned: {planned}"] if planned != DELIVERIES else []
        pacs, reports = self.in_pacs(fresh), self.in_ehr(fresh, "DiagnosticReport")
        expected = {"MR": len(fresh.instances), "SEG": 1, "SR": 1, "OT": 2}
        found += [f"PACS holds {pacs}"] if pacs != expected else []
        found += [f"EHR holds {len(reports)} reports"] if len(reports) != 1 else []
        if reports:
            named = {r["reference"] for r in reports[0]["result"]}
            results = {f"Observation/{o['id']}" for o in self.in_ehr(fresh, "Observation") if _is_imaging(o)}
            found += [f"EHR holds results {results}, its report names {named}"] if not named <= results else []
            found += [f"EHR holds {len(results)} results"] if len(results) != RESULTS else []
        messages = [m for m in self.ris.accepted() if fresh.study_uid in m.text]
        found += [f"RIS accepted {len(messages)} messages"] if len(messages) != 1 else []
        return found

    def in_pacs(self, fresh: Copy) -> dict[str, int]:
        """Instances by modality."""
        url = f"{self.orthanc.dicomweb_url}/studies/{fresh.study_uid}/instances?includefield=Modality"
        counts: dict[str, int] = {}
        for instance in httpx.get(url, trust_env=False, timeout=30).json():
            modality = instance["00080060"]["Value"][0]
            counts[modality] = counts.get(modality, 0) + 1
        return counts

    def in_ehr(self, fresh: Copy, kind: str) -> list[dict[str, Any]]:
        """The patient's resources of a kind."""
        with httpx.Client(base_url=self.ehr.url, trust_env=False, timeout=30) as client:
            patients = client.get("/Patient", params={"identifier": fresh.spec.patient_id}).json()["entry"]
            (patient,) = [e["resource"]["id"] for e in patients]
            found = client.get(f"/{kind}", params={"patient": f"Patient/{patient}", "_count": 200}).json()
        return [e["resource"] for e in found.get("entry", [])]


RESULTS = 4
"""Observations of one reading: see `test_without_a_kill`, where they are counted for the first time."""


def _kind(artifact_name: str) -> str:
    if artifact_name.startswith("key-images/"):
        return "key_images"
    return {"seg.dcm": "seg", "sr.dcm": "sr", "fhir-bundle.json": "fhir_bundle", "oru.hl7": "oru"}[artifact_name]


def _is_imaging(observation: dict[str, Any]) -> bool:
    codes = {c["code"] for category in observation.get("category", []) for c in category.get("coding", [])}
    return "laboratory" not in codes


def settings_for(orthanc: RunningOrthanc, ehr: RunningEhr, ris: RunningRis, triton: str, **ris_more: Any) -> Any:
    return {
        "pacs": {"url": orthanc.dicomweb_url},
        "ehr": {"url": ehr.url},
        "ris": {"host": ris.host, "port": ris.port, "duplicate_safe": True, **ris_more},
        "triton": {"url": triton},
        "retry": {"attempts": 5, "first_wait_s": 0.1, "longest_wait_s": 0.5},
        "deliver": {to: {"first_wait_s": 0.1, "longest_wait_s": 0.5} for to in ("pacs", "ehr", "ris")},
    }
