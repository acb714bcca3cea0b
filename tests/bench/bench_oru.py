"""ORU build beside hl7apy's builder: `python -m tests.bench.bench_oru` prints ms a message and the ratio.

The rival writes the same segments and fields through hl7apy's own API (groups, fields, `to_er7`), in its
tolerant mode, which does no more checking than ours; that both messages are equal is checked before timing.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jinja2
from hl7apy.consts import VALIDATION_LEVEL  # type: ignore[import-untyped]
from hl7apy.core import Group, Message  # type: ignore[import-untyped]

from mappings.model.findings import Findings
from mappings.outputs.findings_to_draft import draft_environment, findings_to_draft
from mappings.outputs.findings_to_oru import findings_to_oru
from tests.bench.row import Row
from tests.builders import build_findings

BUDGET = 10.0
"""Times faster than hl7apy that we must be (DESIGN.md, budgets)."""
ROUNDS = 5
TEMPLATES = Path(__file__).parents[2] / "templates" / "report"


def draft_text(findings: Findings) -> str:
    """The report text that the message carries, less its empty lines: the rival's escaping cannot write the
    line breaks that stand for them."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    text = findings_to_draft(findings, draft_environment(loader), "prostate_mri").text
    return "\n".join(line for line in text.splitlines() if line)


def split_segments(message: bytes) -> list[tuple[str, list[tuple[int, str]]]]:
    """Each segment's name and its filled fields (number, ER7), as the rival's input."""
    segments = []
    for line in message.decode().rstrip("\r").split("\r"):
        name, *fields = line.split("|")
        first = 2 if name == "MSH" else 1
        values = list(enumerate(fields, first))
        segments.append((name, [(n, v) for n, v in values if v and not (name == "MSH" and n == 2)]))
    return segments


def build_with_hl7apy(segments: list[tuple[str, list[tuple[int, str]]]]) -> str:
    """The same message by hl7apy."""
    message = Message("ORU_R01", version="2.5.1", validation_level=VALIDATION_LEVEL.TOLERANT)
    result = message.add_group("oru_r01_patient_result")
    patient: Group = result.add_group("oru_r01_patient")
    order: Group = result.add_group("oru_r01_order_observation")
    for name, fields in segments:
        if name == "MSH":
            segment = message.msh
        elif name == "PID":
            segment = patient.add_segment("PID")
        elif name == "PV1":
            segment = patient.add_group("oru_r01_visit").add_segment("PV1")
        elif name == "OBX":
            segment = order.add_group("oru_r01_observation").add_segment("OBX")
        else:
            segment = order.add_segment(name)
        for number, value in fields:
            setattr(segment, f"{name.lower()}_{number}", value)
    written: str = message.to_er7()
    return written


def time_ms(build: Callable[[], object], repeats: int) -> float:
    """Median over ROUNDS of the mean time of one call, in ms."""
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(repeats):
            build()
        rounds.append((time.perf_counter() - start) / repeats * 1000)
    return statistics.median(rounds)


def bench_oru() -> Row:
    """Both build the same message; RuntimeError where they do not."""
    findings = build_findings()
    text = draft_text(findings)
    ours = findings_to_oru(findings, text=text)
    segments = split_segments(ours)
    if build_with_hl7apy(segments).rstrip("\r") != ours.decode().rstrip("\r"):
        raise RuntimeError("hl7apy's message differs from ours; the comparison would be unfair")
    ours_ms = time_ms(lambda: findings_to_oru(findings, text=text), 50)
    rival_ms = time_ms(lambda: build_with_hl7apy(segments), 2)
    ratio = rival_ms / ours_ms
    return Row(
        f"ORU build, {len(segments)} segments",
        "ms",
        ours_ms,
        budget=f">= {BUDGET:g}x faster",
        within=ratio >= BUDGET,
        rival=rival_ms,
        rival_name="hl7apy",
        ratio=ratio,
    )


def main() -> int:
    """Print the row; 1 where the budget is missed."""
    row = bench_oru()
    print(row.line())
    return 0 if row.within else 1


if __name__ == "__main__":
    sys.exit(main())
