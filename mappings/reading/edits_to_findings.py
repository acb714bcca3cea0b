"""What a person changes in findings, and what follows from it by the rules: categories, impression, PSA density.

A value that a person typed has no method of the model's: only the ellipsoid keeps its own, as people use it too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from mappings.model import codes
from mappings.model.codes import Code
from mappings.model.findings import Assessment, Blank, Dropped, Finding, Findings
from mappings.model.measurement import Measurement
from mappings.model.revision import Edit, RevisionRefused
from mappings.reading.masks_to_measures import ELLIPSOID_FACTOR
from mappings.rules import pirads_v2_1
from mappings.rules.pirads_v2_1 import Dce, Zone

SCORES = ("T2W score", "DWI score")
DCE = "DCE"
DCE_WORDS: tuple[Dce, ...] = ("positive", "negative", "not acquired")
NOT_USABLE = "not usable"
DENSITY = "psa_density"
DIAMETERS = ("diameter_transverse", "diameter_ap", "diameter_si")
VOLUMES: Mapping[str, Code] = {"volume_ellipsoid": codes.ELLIPSOID, "volume_voxels": codes.SEGMENTED_VOXELS}
LARGEST_VALUE = 1e6
_ZONES: Mapping[Code, Zone] = {codes.PERIPHERAL_ZONE: "PZ", codes.TRANSITION_ZONE: "TZ"}
_OVERALL = "PI-RADS overall category"


def apply_edits(findings: Findings, edits: Sequence[Edit], revision: int) -> Findings:
    """`findings` after each edit in turn, everything that depends on them derived anew, the edits kept with the values
    before and after. `revision` is the one that the result will have.

    Raises RevisionRefused for an edit that names nothing that is there, a value that cannot be, or a finding that is
    edited after it was rejected.
    """
    for edit in edits:
        make = _MAKERS.get(edit.kind)
        if make is None:
            raise RevisionRefused(f"'{edit.kind}' is nothing that a person changes in a result.")
        changed, made = make(findings, edit, revision)
        findings = replace(changed, edits=(*changed.edits, made))
    return findings


def _find(findings: Findings, edit: Edit) -> Finding:
    found = next((f for f in findings.findings if f.tracking_id == edit.tracking_id), None)
    if found is None:
        known = ", ".join(f.tracking_id for f in findings.findings) or "none"
        raise RevisionRefused(f"There is no finding '{edit.tracking_id}' to change; the result has: {known}.")
    return found


def _accept(findings: Findings, edit: Edit, revision: int) -> tuple[Findings, Edit]:
    return findings, replace(edit, title=_find(findings, edit).title)


def _put(findings: Findings, finding: Finding) -> Findings:
    """`findings` with `finding` in the place of the one with its tracking id."""
    rows = tuple(finding if f.tracking_id == finding.tracking_id else f for f in findings.findings)
    return replace(findings, findings=rows)


# --- a rejected finding --------------------------------------------------------------------------------------


def _reject(findings: Findings, edit: Edit, revision: int) -> tuple[Findings, Edit]:
    rejected = _find(findings, edit)
    dropped = Dropped(rejected, findings.model, revision, "rejected", edit.person, edit.at, edit.reason)
    left = remove_findings(findings, [dropped])
    return left, replace(edit, title=rejected.title)


def remove_findings(findings: Findings, dropped: Sequence[Dropped]) -> Findings:
    """`findings` without these, remembering them: their segments, blanks and rows of the comparison go too, and the
    overall category and what needs a gland are derived anew."""
    gone = {row.finding.tracking_uid for row in dropped}
    ids = {row.finding.tracking_id for row in dropped}
    kept = tuple(f for f in findings.findings if f.tracking_uid not in gone)
    blanks = tuple(b for b in findings.blanks if b.name.split(" ")[0] not in ids)
    left = replace(findings, findings=kept, blanks=blanks, dropped=(*findings.dropped, *dropped))
    left = rederive_overall(_without_rows(_without_segments(left, gone), ids))
    if findings.gland is not None and left.gland is None:
        blanks = tuple(b for b in left.blanks if b.name != "PSA density")
        left = replace(left, blanks=(*blanks, Blank("Prostate gland", "a person rejected what the model drew")))
    return left


def _without_segments(findings: Findings, gone: set[str]) -> Findings:
    """Segments of findings that are gone go too; PS3.3 C.8.20.2 numbers the others anew, without gaps."""
    kept = [s for s in findings.segments if s.tracking_uid not in gone]
    numbers = {segment.number: number for number, segment in enumerate(kept, 1)}
    rows = (replace(f, segment_number=numbers.get(f.segment_number or 0)) for f in findings.findings)
    segments = tuple(replace(segment, number=numbers[segment.number]) for segment in kept)
    return replace(findings, findings=tuple(rows), segments=segments)


def _without_rows(findings: Findings, ids: set[str]) -> Findings:
    done = findings.comparison
    if done is None:
        return findings
    rows = tuple(row for row in done.lesions if row.current is None or row.current.tracking_id not in ids)
    gland = done.gland if findings.gland is not None else ()
    return replace(findings, comparison=replace(done, lesions=rows, gland=gland))


def rederive_overall(findings: Findings) -> Findings:
    """The overall category from the lesions that are there. Where none can be given any more, the former one is
    remembered as blank: systems that have it must be told."""
    given = next((a for a in findings.assessments if a.key == "pirads_overall"), None)
    overall = pirads_v2_1.assess_study([a for f in findings.lesions if (a := f.assessment("pirads"))])
    others = tuple(a for a in findings.assessments if a.key != "pirads_overall")
    blanks = tuple(b for b in findings.blanks if b.name != _OVERALL)
    if overall is not None:
        empty = tuple(a for a in findings.blank_assessments if a.key != overall.key)
        return replace(findings, assessments=(overall, *others), blanks=blanks, blank_assessments=empty)
    if given is None:
        return findings
    blank = Blank(_OVERALL, "no lesion is left to derive it from; the category is yours to give")
    empty = (*findings.blank_assessments, given)
    return replace(findings, assessments=others, blanks=(*blanks, blank), blank_assessments=empty)


# --- a score -------------------------------------------------------------------------------------------------


def _score(findings: Findings, edit: Edit, revision: int) -> tuple[Findings, Edit]:
    """A changed T2W or DWI score or DCE result; the table decides the category anew."""
    lesion = _find(findings, edit)
    old = lesion.assessment("pirads")
    before = _input(old, edit.key)
    if old is None or before is None or edit.key not in (*SCORES, DCE):
        raise RevisionRefused(f"{lesion.title} has no {edit.key or 'input'} that can be changed.")
    after = _check_score(edit)
    inputs = {name: _input(old, name) or NOT_USABLE for name in (*SCORES, DCE)} | {edit.key: after}
    new = pirads_v2_1.assess_lesion(_ZONES.get(lesion.zone) if lesion.zone else None, *_read_inputs(inputs))
    changed = _put(findings, _with_category(lesion, old, new))
    changed = _with_category_blank(changed, lesion, new)
    made = replace(edit, title=lesion.title, label=edit.key, before=before, after=after)
    return rederive_overall(changed), made


def _input(assessment: Assessment | None, name: str) -> str | None:
    return next((i.value for i in assessment.inputs if i.name == name), None) if assessment else None


def _check_score(edit: Edit) -> str:
    allowed = DCE_WORDS if edit.key == DCE else ("1", "2", "3", "4", "5", NOT_USABLE)
    value = edit.value.strip()
    if value not in allowed:
        raise RevisionRefused(f"{edit.key} may be {', '.join(allowed)}; nothing else was changed.")
    return value


def _read_inputs(inputs: Mapping[str, str]) -> tuple[int | None, int | None, Dce]:
    t2w, dwi = (int(inputs[name]) if inputs[name].isdecimal() else None for name in SCORES)
    dce = inputs[DCE]
    return t2w, dwi, next((word for word in DCE_WORDS if word == dce), "not acquired")


def _with_category(lesion: Finding, old: Assessment, new: Assessment) -> Finding:
    assessments = tuple(new if a.key == old.key else a for a in lesion.assessments)
    return _with_size_note(replace(lesion, assessments=assessments), lesion)


def _with_size_note(lesion: Finding, former: Finding) -> Finding:
    """The note on category and size as it is now, in the place of the former one."""
    notes = [note for note in lesion.notes if note != _size_note(former)]
    now = _size_note(lesion)
    return replace(lesion, notes=(*([now] if now else []), *notes))


def _size_note(lesion: Finding) -> str | None:
    category, size = lesion.assessment("pirads"), lesion.measurement("diameter_in_plane")
    return pirads_v2_1.size_note(category.score, size.value) if category and size else None


def _with_category_blank(findings: Findings, lesion: Finding, new: Assessment) -> Findings:
    name = f"{lesion.tracking_id} PI-RADS category"
    blanks = tuple(b for b in findings.blanks if b.name != name)
    return replace(findings, blanks=(*blanks, *([Blank(name, new.explanation)] if new.score == "X" else [])))


# --- a measurement, the PSA ----------------------------------------------------------------------------------


def _measure(findings: Findings, edit: Edit, revision: int) -> tuple[Findings, Edit]:
    """A changed number, and what was derived from it: ellipsoid volume, PSA density, the note on size."""
    finding = _find(findings, edit)
    old = finding.measurement(edit.key)
    if old is None or edit.key == DENSITY:
        why = "is derived; change the PSA or the volume" if edit.key == DENSITY else "is not measured"
        raise RevisionRefused(f"'{edit.key}' of {finding.title} {why}.")
    new = _typed(old, edit)
    changed = _with_size_note(_measured(finding, new), finding)
    if edit.key in DIAMETERS:
        changed = _rederive_ellipsoid(changed)
    result = _put(findings, changed)
    if finding == findings.gland:
        result = rederive_density(result, findings)
    made = replace(edit, title=finding.title, label=old.label, before=_show(old), after=_show(new))
    return _without_change(result, finding.tracking_id), made


def _typed(old: Measurement, edit: Edit) -> Measurement:
    try:
        value = float(edit.value)
    except ValueError:
        value = -1.0
    if not 0 < value < LARGEST_VALUE:
        raise RevisionRefused(f"{old.label} needs a number over 0 in {old.unit.value}; nothing was changed.")
    method = old.method if old.method == codes.ELLIPSOID else None
    return replace(old, value=round(value, old.decimals), method=method)


def _show(measurement: Measurement) -> str:
    return f"{measurement.text} {measurement.unit.value}"


def _measured(finding: Finding, new: Measurement) -> Finding:
    return replace(finding, measurements=tuple(new if m.key == new.key else m for m in finding.measurements))


def _rederive_ellipsoid(gland: Finding) -> Finding:
    """Length x width x height x 0.52 from the diameters as shown (PI-RADS v2.1)."""
    sizes = [m for key in DIAMETERS if (m := gland.measurement(key))]
    volume = gland.measurement("volume_ellipsoid")
    if volume is None or len(sizes) < len(DIAMETERS):
        return gland
    product_mm3 = sizes[0].value * sizes[1].value * sizes[2].value
    return _measured(gland, replace(volume, value=round(product_mm3 * ELLIPSOID_FACTOR / 1000, volume.decimals)))


def _without_change(findings: Findings, tracking_id: str) -> Findings:
    """The numbers of the comparison were computed from the values as they were: of what a person measured anew, none
    is given."""
    done = findings.comparison
    if done is None:
        return findings
    note = "A person changed a measurement: no growth since the prior is given."
    rows = tuple(
        replace(row, changes=(), doubling_time=None, notes=tuple(dict.fromkeys((*row.notes, note))))
        if row.current is not None and row.current.tracking_id == tracking_id
        else row
        for row in done.lesions
    )
    gland = () if tracking_id == "gland" else done.gland
    return replace(findings, comparison=replace(done, lesions=rows, gland=gland))


def _psa(findings: Findings, edit: Edit, revision: int) -> tuple[Findings, Edit]:
    """Another PSA of the patient's, named by its reference in the EHR, is the one in use."""
    chosen = next((v for v in findings.context.labs if v.reference == edit.value), None)
    if chosen is None or chosen.code != codes.PSA or chosen.unit != codes.NG_ML.value or chosen.value <= 0:
        known = ", ".join(v.reference for v in findings.context.labs if v.code == codes.PSA) or "none"
        raise RevisionRefused(f"That is no PSA of the context in {codes.NG_ML.value}; it has: {known}.")
    old = findings.psa
    before = f"{old.value:.10g} {old.unit}" if old else ""
    made = replace(edit, title="PSA", label="PSA", before=before, after=f"{chosen.value:.10g} {chosen.unit}")
    return rederive_density(replace(findings, psa=chosen), findings), made


def rederive_density(findings: Findings, former: Findings) -> Findings:
    """The PSA density from PSA and gland volume as shown (PI-RADS v2.1), with the volume that it was made with."""
    gland, volume = findings.gland, _density_volume(former)
    if gland is None or findings.psa is None or volume not in VOLUMES:
        return findings
    over = gland.measurement(volume)
    if over is None or over.value <= 0:
        return findings
    words = "ellipsoid" if volume == "volume_ellipsoid" else "voxel count"
    value = round(findings.psa.value / over.value, 2)
    label, concept = f"PSA density (volume by {words})", codes.PSA_DENSITY
    old = gland.measurement(DENSITY)
    new = Measurement(DENSITY, label, concept, value, codes.NG_ML_ML, 2, over.method)
    new = replace(new, label=old.label) if old else new
    rest = tuple(m for m in gland.measurements if m.key != DENSITY)
    blanks = tuple(b for b in findings.blanks if b.name != "PSA density")
    return replace(_put(findings, replace(gland, measurements=(*rest, new))), blanks=blanks)


def _density_volume(findings: Findings) -> str:
    """The key of the volume under the density: the one that its method names; the ellipsoid's where it names none."""
    density = findings.gland.measurement(DENSITY) if findings.gland else None
    if density is None or density.method is None:
        return "volume_voxels" if density is not None and "voxel" in density.label else "volume_ellipsoid"
    return next((key for key, method in VOLUMES.items() if method == density.method), "volume_ellipsoid")


def _text(findings: Findings, edit: Edit, revision: int) -> tuple[Findings, Edit]:
    """The report in the person's own words; the words themselves are in `report_text` only."""
    before, after = ("own words" if text.strip() else "" for text in (findings.report_text, edit.value))
    made = replace(edit, value="", title="Report", label="Report text", before=before, after=after)
    return replace(findings, report_text=edit.value.strip()), made


_MAKERS: Mapping[str, Callable[[Findings, Edit, int], tuple[Findings, Edit]]] = {
    "accepted": _accept,
    "rejected": _reject,
    "measurement": _measure,
    "score": _score,
    "psa": _psa,
    "text": _text,
}
