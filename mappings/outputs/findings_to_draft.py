"""The findings as a report draft, text and HTML, through Jinja templates that a site can edit.

A template sees: `findings` (mappings.model.findings, every string made printable), `lesions` (highest category
first), `density_volume` (the gland volume under the PSA density, or None), `banner`, `impression`, `since` (what
changed and matters, line by line), `no_lesion` (what is said where there is none), `revision` (what people did to the
result, line by line), `own_words` (the report in the signing person's words, line by line), and the filters and
functions of `draft_environment`.
"""

import dataclasses
import re
import textwrap
from datetime import date, datetime
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from mappings.model.findings import Finding, Findings
from mappings.model.measurement import Measurement
from mappings.outputs.comparison_values import (
    comparison_impression,
    describe_gone,
    describe_match,
    has_comparison,
    other_priors,
    signed,
)
from mappings.outputs.impression import (
    describe_lesion,
    describe_place,
    findings_to_impression,
    lesion_category,
    lesion_size,
    lesions_by_category,
    no_lesion,
    status_banner,
)
from mappings.outputs.printable import make_printable
from mappings.outputs.revision_words import revision_sentences

TEXT_WIDTH = 80
"""Columns of the text draft."""

LABEL_WIDTH = 26
"""Columns of the labels at the left of the text draft."""

GENERIC_TEMPLATE = "generic"
"""Serves every protocol that names a template which is not there."""

_AGE = re.compile(r"(\d{3})([DWMY])")
_AGE_UNITS = {"D": "days", "W": "weeks", "M": "months", "Y": "years"}


@dataclasses.dataclass(frozen=True)
class Draft:
    """One report draft as plain text and as a standalone HTML page."""

    text: str
    html: str


def format_day(day: date | None) -> str:
    """ISO date; "not stated" for None."""
    return day.isoformat()[:10] if day else "not stated"


def format_moment(moment: datetime) -> str:
    """ISO date and minute with the offset from UTC."""
    return moment.isoformat(sep=" ", timespec="minutes")


def format_person(name: str) -> str:
    """A DICOM person name as `Family, Given Middle`; the first representation that is not empty."""
    groups = [group for group in name.split("=") if group.strip("^ ")]
    if not groups:
        return "not stated"
    family, _, rest = groups[0].partition("^")
    given = " ".join(part for part in rest.split("^") if part.strip())
    return ", ".join(part for part in (family, given) if part)


def format_age(age: str) -> str:
    """A DICOM age string (`064Y`) in words; other text as it is, "not stated" where empty."""
    match = _AGE.fullmatch(age)
    return f"{int(match[1])} {_AGE_UNITS[match[2]]}" if match else age or "not stated"


def format_number(value: float) -> str:
    """A number as its source gave it: no digits added, ten at most."""
    return f"{value:.10g}"


def wrap_text(text: str, first: str = "", rest: str = "") -> str:
    """`text` as lines of TEXT_WIDTH, the first led by `first`, the others by `rest`."""
    lines = textwrap.wrap(text, TEXT_WIDTH, initial_indent=first, subsequent_indent=rest)
    return "\n".join(lines) or first.rstrip()


def format_row(label: str, value: str, mark: str = "") -> str:
    """`label: value [mark]`, the mark flush right; a long value hangs in its column, over several lines."""
    lead = f"  {label + ':':<{LABEL_WIDTH}} "
    if len(lead) > LABEL_WIDTH + 3:
        lead = wrap_text(f"{label}:", "  ", "  ") + "\n" + " " * (LABEL_WIDTH + 3)
    hanging = textwrap.wrap(value, TEXT_WIDTH - LABEL_WIDTH - 3) or [""]
    lines = [lead + hanging[0], *(" " * (LABEL_WIDTH + 3) + line for line in hanging[1:])]
    tag = f"[{mark}]" if mark else ""
    room = TEXT_WIDTH - len(lines[-1].rpartition("\n")[2])
    lines[-1:] = [f"{lines[-1]}{tag:>{room}}"] if len(tag) < room else [lines[-1], f"{tag:>{TEXT_WIDTH}}"]
    return "\n".join(line.rstrip() for line in lines)


def format_heading(title: str, mark: str = "") -> str:
    """A section heading: the title in capitals, what kind of text follows, a rule below."""
    return f"{title.upper()}{mark:>{TEXT_WIDTH - len(title)}}".rstrip() + "\n" + "-" * TEXT_WIDTH


def draft_environment(loader: jinja2.BaseLoader) -> SandboxedEnvironment:
    """A Jinja environment for report templates; `loader`'s root is templates/report.

    Names ending in `.html.j2` are escaped. A name that a template uses and nobody gives is an error.
    """
    environment = SandboxedEnvironment(
        loader=loader,
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "day": format_day,
        "moment": format_moment,
        "person": format_person,
        "age": format_age,
        "number": format_number,
        "wrap": wrap_text,
        "place": describe_place,
        "describe": describe_lesion,
        "category": lesion_category,
        "size": lesion_size,
        "signed": signed,
        "match": describe_match,
        "gone": describe_gone,
        "other_priors": other_priors,
        "has_comparison": has_comparison,
    }
    environment.globals |= {"row": format_row, "heading": format_heading}
    return environment


def _density_volume(gland: Finding | None) -> Measurement | None:
    """The gland volume that the PSA density was made with: the one of the same method. None where the
    density does not say."""
    density = gland.measurement("psa_density") if gland else None
    if gland is None or density is None or density.method is None:
        return None
    volumes = (m for m in gland.measurements if m.key.startswith("volume"))
    return next((v for v in volumes if v.method == density.method), None)


def _render(environment: jinja2.Environment, template: str, kind: str, names: dict[str, Any]) -> str:
    candidates = [f"{template}.{kind}.j2", f"{GENERIC_TEMPLATE}.{kind}.j2"]
    return environment.select_template(candidates).render(names)


def findings_to_draft(findings: Findings, environment: jinja2.Environment, template: str) -> Draft:
    """The draft by the templates `TEMPLATE.txt.j2` and `TEMPLATE.html.j2`, or `generic.*` where missing.

    `environment` comes from `draft_environment`. Raises jinja2.TemplateError where a template is at fault.
    """
    shown: Findings = make_printable(findings)
    names = {
        "findings": shown,
        "lesions": lesions_by_category(shown),
        "density_volume": _density_volume(shown.gland),
        "banner": status_banner(shown),
        "impression": findings_to_impression(shown),
        "since": comparison_impression(shown, lesions_by_category(shown)),
        "no_lesion": no_lesion(shown),
        "revision": revision_sentences(shown),
        "own_words": [make_printable(line) for line in findings.report_text.splitlines()],
    }
    text = _render(environment, template, "txt", names)
    return Draft(text.strip("\n") + "\n", _render(environment, template, "html", names))
