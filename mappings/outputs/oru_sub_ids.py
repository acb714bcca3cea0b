"""OBX-4 over the revisions of one result: an observation keeps its sub-id, and one that is gone is deleted by it.

A receiver knows an observation by OBX-3 and OBX-4 (HL7 v2.5.1 7.4.2.3, 7.4.2.4): a sub-id that moved to another
observation would overwrite it, and one that is just left out would stay. What was sent is read from the former
message itself, so that it is right whatever made that message.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mappings.outputs.er7 import Field, Verbatim, write_field
from mappings.outputs.oru_observation import Common, write_obx

DELETED = "D"
"""OBX-11 (table 0085): deletes the OBX record."""
NULL = Verbatim('""')
"""HL7 v2.5.1 2.5.3: the receiver deletes the value that it has."""

TRACKING_UID, STUDY_UID = "112040", "110180"
_NARRATIVES = ("18782-3", "19005-8")
Group = tuple[str, Sequence[list[Field]]]
"""What a group of OBX is about (a tracking UID, or a code that only this group has) and its OBX-2 to OBX-19."""


@dataclass(frozen=True)
class Sent:
    """One OBX of the former message, as sent: OBX-2, OBX-3, OBX-4, OBX-5."""

    kind: str
    observation: str
    sub_id: str
    value: str
    deleted: bool

    @property
    def group(self) -> int:
        """The number before the dot of OBX-4."""
        return int(self.sub_id.partition(".")[0])

    @property
    def item(self) -> int:
        """The number after the dot of OBX-4."""
        return int(self.sub_id.partition(".")[2])

    @property
    def code(self) -> str:
        """The code of OBX-3."""
        return self.observation.partition("^")[0]


def read_sent(former: bytes | None) -> tuple[Sent, ...]:
    """The OBX of the message that was sent before; none where there was none."""
    lines = former.decode("utf-8").split("\r") if former else []
    fields = (line.split("|") for line in lines if line.startswith("OBX|"))
    return tuple(Sent(f[2], f[3], f[4], f[5], f[11] == DELETED) for f in fields)


def _former_groups(sent: Sequence[Sent]) -> dict[str, int]:
    """The number of each group that is not deleted, by what it is about."""
    known: dict[str, int] = {}
    for row in sent:
        if row.deleted:
            continue
        if row.code == TRACKING_UID:
            known[row.value] = row.group
        elif row.code in (STUDY_UID, *_NARRATIVES):
            known[row.code] = row.group
    return known


def _identity(observation: str) -> tuple[str, str]:
    """Code and alternate code: what an observation is, whatever it is called."""
    parts = [*observation.split("^"), *[""] * 4]
    return parts[0], parts[3]


def number_observations(groups: Sequence[Group], sent: Sequence[Sent]) -> Iterator[list[Field]]:
    """OBX-2 to OBX-19 of each observation with its OBX-4 `group.item`: as sent before where it was, else after
    everything that was ever sent."""
    known = _former_groups(sent)
    free = max((row.group for row in sent), default=0)
    for name, observations in groups:
        if name not in known:
            free += 1
        number = known.get(name, free)
        items = [row for row in sent if row.group == number]
        for item, fields in zip(_number_items(observations, items), observations, strict=True):
            yield [*fields[:2], f"{number}.{item}", *fields[3:]]


def _number_items(observations: Sequence[list[Field]], sent: Sequence[Sent]) -> Iterator[int]:
    """The n-th observation of a kind has the number that the n-th of that kind had. One that was deleted is not given
    again, but for lines of text, which have no value of their own."""
    before: dict[tuple[str, str], list[int]] = {}
    for row in (row for row in sent if not row.deleted or row.code in _NARRATIVES):
        before.setdefault(_identity(row.observation), []).append(row.item)
    free, seen = max((row.item for row in sent), default=0), Counter[tuple[str, str]]()
    for fields in observations:
        what = _identity(write_field(fields[1]))
        numbers, place = before.get(what, []), seen[what]
        seen[what] += 1
        if place >= len(numbers):
            free += 1
        yield numbers[place] if place < len(numbers) else free


def write_deletions(common: Common, sent: Sequence[Sent], kept: set[str]) -> Iterator[list[Field]]:
    """An OBX with status D for each observation that was sent and whose sub-id is not among `kept`. One that was
    deleted before is deleted again: nobody knows whether that message arrived."""
    for row in sent:
        if row.sub_id not in kept:
            fields = write_obx(replace(common, status=DELETED), row.kind, (), NULL)
            yield [fields[0], Verbatim(row.observation), row.sub_id, *fields[3:]]
