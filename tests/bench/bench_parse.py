"""Inbound parse beside python-hl7: `python -m tests.bench.bench_parse` prints us a message and the ratio.

Both start from the same bytes and read the same fields; that they read the same values is checked before timing.
"""

import statistics
import sys
import time
from collections.abc import Callable

import hl7

from mappings.inputs.er7_to_message import read_message
from mappings.outputs.findings_to_oru import findings_to_oru
from tests.builders import build_findings

BUDGET = 1.0
"""Times as fast as python-hl7 that we must be (DESIGN.md, budgets)."""
ROUNDS = 7

ORM = (
    "MSH|^~\\&|RIS|CLINIC|WETREAD|AI|20260102030405+0100||ORM^O01^ORM_O01|MSG0001|P|2.5.1||||||UNICODE UTF-8\r"
    "PID|1||4711^^^HOSP^MR~99^^^&1.2.3&ISO^PI||Müller^Jane^Q^^Dr||19610203|F|||Street 1^^Town^^12345^DEU\r"
    "PV1|1|O|RAD^^^HOSP||||17^Referrer^Rita^^^Dr\r"
    "ORC|NW|P1^EHR|F1^RIS||SC||^^^202601050800^^S||20260102090000|||17^Referrer^Rita^^^Dr\r"
    "OBR|1|P1^EHR|F1^RIS|MRPRO^MRI prostate^99SITE^24531-6^MR Prostate^LN|||||||||PSA 8 \\T\\ rising|||17^Referrer^Rita"
    "||ACC1|RP1|SPS1||||MR|||^^^202601050800^^S||||^Elevated PSA\r"
    "ZDS|1.2.840.99.1.2.3.4.5^RIS^Application^DICOM\r"
).encode()

Place = tuple[str, int, int]
"""Segment, field, component; of the first segment of that name and the first repetition."""

ORDER_PLACES: tuple[Place, ...] = (
    ("MSH", 9, 2),
    ("MSH", 10, 1),
    ("PID", 3, 1),
    ("PID", 3, 4),
    ("PID", 5, 1),
    ("ORC", 1, 1),
    ("ORC", 2, 1),
    ("OBR", 4, 1),
    ("OBR", 13, 1),
    ("ZDS", 1, 1),
)
REPORT_PLACES: tuple[Place, ...] = (
    ("MSH", 9, 2),
    ("MSH", 10, 1),
    ("PID", 3, 1),
    ("PID", 3, 5),
    ("PID", 5, 1),
    ("ORC", 1, 1),
    ("OBR", 4, 1),
    ("OBR", 25, 1),
    ("OBX", 3, 1),
    ("OBX", 5, 1),
)


def read_ours(raw: bytes, places: tuple[Place, ...]) -> list[str]:
    """The values at `places` by our reader."""
    message = read_message(raw)
    segments = {name: message.first(name) for name in {name for name, _, _ in places}}
    return [segments[name].text(field, component) for name, field, component in places]


def read_theirs(raw: bytes, places: tuple[Place, ...]) -> list[str]:
    """The values at `places` by python-hl7."""
    message = hl7.parse(raw.decode())
    return [message.unescape(str(message.extract_field(name, 1, n, 1, c, 1))) for name, n, c in places]


def time_us(read: Callable[[], object], repeats: int) -> float:
    """Median over ROUNDS of the mean time of one call, in microseconds."""
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(repeats):
            read()
        rounds.append((time.perf_counter() - start) / repeats * 1e6)
    return statistics.median(rounds)


def compare(name: str, raw: bytes, places: tuple[Place, ...], repeats: int) -> bool:
    """Print name, ours, rival, ratio and budget of one message; False where they disagree or the budget is missed."""
    ours, theirs = read_ours(raw, places), read_theirs(raw, places)
    if ours != theirs or not any(ours):
        print(f"{name}: python-hl7 reads {theirs}, we read {ours}", file=sys.stderr)
        return False
    ours_us = time_us(lambda: read_ours(raw, places), repeats)
    theirs_us = time_us(lambda: read_theirs(raw, places), repeats)
    ratio = theirs_us / ours_us
    print(
        f"parse {name}, {len(raw)} bytes, {len(places)} fields | ours {ours_us:.0f} us | "
        f"python-hl7 {theirs_us:.0f} us | ratio {ratio:.1f} | budget >= {BUDGET:.0f}"
    )
    return ratio >= BUDGET


def main() -> int:
    """Both samples; 1 where either misses the budget."""
    oru = findings_to_oru(build_findings(), text="Report line\n" * 30)
    good = [compare("ORM^O01", ORM, ORDER_PLACES, 300), compare("ORU^R01", oru, REPORT_PLACES, 60)]
    return 0 if all(good) else 1


if __name__ == "__main__":
    raise SystemExit(main())
