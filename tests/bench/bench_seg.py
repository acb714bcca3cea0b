"""Prints how long our SEG takes beside plain highdicom: one row with the ratio and its budget.

The case: 19 slices of 384x384, four overlapping segments (gland, two zones, one lesion). Both sides get the same
source headers and masks and end with the bytes of the file. Runs alternate; medians are compared.
Run: .venv/bin/python -m tests.bench.bench_seg
"""

import statistics
import sys
import time
from collections.abc import Callable

import highdicom
import numpy as np
from highdicom.seg import SegmentDescription
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from mappings.model.findings import Findings
from mappings.outputs.dicom_header import write_dicom
from mappings.outputs.findings_to_seg import findings_to_seg
from tests.bench.row import Row
from tests.builders import build_findings, build_lesion
from tests.dicom_sources import build_sources

SHAPE = (19, 384, 384)
ROUNDS = 15
BUDGET_RATIO = 1.2
Masks = dict[str, np.ndarray]


def build_case() -> tuple[Findings, Masks, list[Dataset]]:
    """Findings, masks and headers of the benchmark."""
    gland = np.zeros(SHAPE, np.uint8)
    gland[4:16, 140:240, 130:250] = 1
    zones = gland * 2
    zones[:, 200:] = gland[:, 200:]
    lesions = np.zeros(SHAPE, np.uint8)
    lesions[7:10, 205:220, 140:155] = 1
    findings = build_findings(lesions=(build_lesion(),))
    return findings, {"gland": gland, "zones": zones, "lesions": lesions}, build_sources(SHAPE)


def run_ours(findings: Findings, masks: Masks, sources: list[Dataset]) -> bytes:
    """Our mapping, to bytes."""
    dataset = findings_to_seg(findings, masks, sources)
    assert dataset is not None
    return write_dicom(dataset)


def run_rival(findings: Findings, masks: Masks, sources: list[Dataset]) -> bytes:
    """highdicom as its user guide shows it: stacked segments, no derived ids, no checks."""
    pixels = np.stack([masks[s.mask] == s.label for s in findings.segments], axis=-1).astype(np.uint8)
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="rival", version="1", family=codes.DCM.ArtificialIntelligence
    )
    descriptions = [
        SegmentDescription(
            segment_number=segment.number,
            segment_label=segment.name,
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=codes.SCT.Prostate,
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
            tracking_uid=segment.tracking_uid,
            tracking_id=segment.tracking_id,
        )
        for segment in findings.segments
    ]
    dataset = highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=pixels,
        segmentation_type="BINARY",
        segment_descriptions=descriptions,
        series_instance_uid=highdicom.UID(),
        series_number=1001,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="rival",
        manufacturer_model_name="rival",
        software_versions="1",
        device_serial_number="1",
    )
    return write_dicom(dataset)


def measure_ms(run: Callable[[], bytes]) -> float:
    """One run, in ms."""
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1000


def bench_seg() -> Row:
    """Both in turn; medians."""
    case = build_case()
    ours, rival = [], []
    for index in range(ROUNDS + 2):
        pair = measure_ms(lambda: run_ours(*case)), measure_ms(lambda: run_rival(*case))
        if index >= 2:
            ours.append(pair[0])
            rival.append(pair[1])
    ours_ms, rival_ms = statistics.median(ours), statistics.median(rival)
    ratio = ours_ms / rival_ms
    return Row(
        "SEG 19x384x384, 4 segments",
        "ms",
        ours_ms,
        budget=f"<= {BUDGET_RATIO:g}x",
        within=ratio <= BUDGET_RATIO,
        rival=rival_ms,
        rival_name="highdicom",
        ratio=ratio,
    )


def main() -> int:
    """Prints the row; 1 where the ratio is over budget."""
    row = bench_seg()
    print(row.line())
    return 0 if row.within else 1


if __name__ == "__main__":
    sys.exit(main())
