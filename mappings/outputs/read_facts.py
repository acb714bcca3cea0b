"""What a rendering says, as facts to compare: where (which finding), what, and the value.

The readers (`read_*.py`) turn rendered bytes into facts with generic parsers and share no code with the mappings
that wrote them, so that a slip in a rendering cannot hide in the check of it.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from mappings.model.codes import BILATERAL, LEFT, RIGHT, Code
from mappings.model.findings import Finding, Findings

_UNSHOWN = re.compile(
    r"<U\+[0-9A-F]{4,6}>"
    "|[?\ufffd\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
_SPACE = re.compile(r"\s+")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
HEAD_LENGTH = 48
"""Characters of a name that are compared: DICOM cuts names at 64, with an ellipsis."""
SHOWN_LENGTH = 160


@dataclass(frozen=True)
class Value:
    """A value as it is compared (`key`) and as a message shows it."""

    key: str
    shown: str = field(compare=False)


def exact(value: object) -> Value:
    """Equal only to the same characters; ids and numbers as written."""
    return Value(str(value), str(value))


def squeeze(text: str) -> str:
    """`text` without spaces and without characters that do not print (nor the `<U+0007>` that shows them)."""
    return _SPACE.sub("", _UNSHOWN.sub("", _SPACE.sub(" ", text)))


def prose(text: str) -> Value:
    """Equal whatever the line breaks, and however an unprintable character is shown."""
    shown = " ".join(text.split())
    return Value(squeeze(text), shown if len(shown) <= SHOWN_LENGTH else f"{shown[:SHOWN_LENGTH]}...")


def head(text: str) -> str:
    """The start of a name, as far as every rendering keeps it."""
    words = _UNSHOWN.sub("", _SPACE.sub(" ", text.replace("\\", "/"))).split()
    return " ".join(words)[:HEAD_LENGTH].strip()


def number(text: object) -> Value:
    """Equal as numbers: 812 and 812.0. For formats that do not keep digits; not a number: as it is."""
    try:
        return Value(f"{float(str(text)):.10g}", str(text))
    except ValueError:
        return exact(text)


def withheld(value: str) -> Value:
    """Compared but never shown: names and ids of patients and orders."""
    return Value(value, "a value not shown here" if value else "no value")


def moment(when: datetime) -> Value:
    """Equal as instants, whatever the zone."""
    return exact(when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))


def code_name(scheme: str, value: str, meaning: str) -> str:
    """A code in words: meaning, scheme, value."""
    return f"{head(meaning)} ({scheme} {value})"


def name_of(code: Code) -> str:
    """A code of the findings in words."""
    return code_name(code.scheme, code.value, code.meaning)


class Facts:
    """A bag of facts."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], list[Value]] = {}

    def add(self, where: str, what: str, value: Value | str) -> None:
        """One more fact; a str counts as `exact`."""
        self.values.setdefault((where, what), []).append(exact(value) if isinstance(value, str) else value)

    def add_once(self, where: str, what: str, value: Value | str) -> None:
        """For what a rendering repeats on purpose: equal copies count as one."""
        given = exact(value) if isinstance(value, str) else value
        if given not in self.values.get((where, what), []):
            self.add(where, what, given)


def compare(artifact: str, expected: Facts, found: Facts) -> list[str]:
    """Every fact that is missing, extra or different, one sentence each."""
    messages = []
    for key in dict.fromkeys([*expected.values, *found.values]):
        wanted, given = expected.values.get(key, []), found.values.get(key, [])
        missing, extra = list((Counter(wanted) - Counter(given)).elements()), Counter(given) - Counter(wanted)
        surplus = list(extra.elements())
        for index in range(max(len(missing), len(surplus))):
            left = f"'{missing[index].shown}'" if index < len(missing) else ("no more" if wanted else "nothing")
            right = f"'{surplus[index].shown}'" if index < len(surplus) else ("no more" if given else "nothing")
            messages.append(f"{artifact}: {key[0]}: {key[1]}: expected {left}, found {right}")
    return messages


def find_slips(words: str, required: Iterable[str], allowed: Iterable[str] = ()) -> list[str]:
    """What a sentence fails to say, or says too much: a required piece that is not there; a number or a side
    that is left when all required and allowed pieces are taken out."""
    rest = squeeze(words).casefold()
    slips = []
    for piece in sorted(required, key=len, reverse=True):
        key = squeeze(piece).casefold()
        if key not in rest:
            slips.append(f"expected to say '{prose(piece).shown}', which was not found")
        rest = rest.replace(key, "\n") if key else rest
    for piece in sorted(allowed, key=len, reverse=True):
        key = squeeze(piece).casefold()
        rest = rest.replace(key, "\n") if key else rest
    slips += [f"expected no other number, found '{stray}'" for stray in _NUMBER.findall(rest)]
    sides = [code.meaning.casefold() for code in (RIGHT, LEFT, BILATERAL)]
    return slips + [f"expected no other side, found '{side}'" for side in sides if squeeze(side) in rest]


def read_status(banner: str) -> str:
    """The status that a banner's words stand for, empty where they stand for none."""
    words = banner.casefold().partition("signed by")[0]
    if "withdrawn" in words:
        return "entered-in-error"
    if "unverified" in words:
        return "preliminary" if "preliminary" in words else ""
    return next((status for status in ("amended", "corrected", "final") if status in words), "")


def place_words(finding: Finding) -> str:
    """Side, zone and level as sentences name them, in small letters; empty where nothing is known."""
    known = [code.meaning for code in (finding.laterality, finding.zone) if code is not None]
    return ", ".join([*known, *([finding.level] if finding.level else [])]).casefold()


def find_unsaid(words: str, findings: Findings) -> list[str]:
    """Sentences of the findings that a draft does not hold: derivations, notes, warnings."""
    text, wanted = squeeze(words), [("document", warning) for warning in findings.warnings]
    for finding in findings.findings:
        wanted += [(finding.tracking_id, a.explanation) for a in finding.assessments]
        wanted += [(finding.tracking_id, note) for note in finding.notes]
    wanted += [("study", a.explanation) for a in findings.assessments]
    return [
        f"{where}: sentence: expected '{prose(sentence).shown}', which was not found"
        for where, sentence in wanted
        if squeeze(sentence) not in text
    ]


def lesion_pieces(lesion: Finding) -> tuple[list[str], list[str]]:
    """What a sentence about a lesion must say (title, categories, side, level) and what it may say."""
    required = [lesion.title, *(f"{a.label} {a.score}" for a in lesion.assessments)]
    required += [lesion.laterality.meaning] if lesion.laterality else []
    required += [lesion.level] if lesion.level else []
    allowed = [f"{m.label} {m.text} {m.unit.value}" for m in lesion.measurements]
    allowed += [code.meaning for code in (lesion.zone, lesion.sector) if code is not None]
    return required, [*allowed, *([place_words(lesion)] if place_words(lesion) else [])]
