"""Protocol files: loaded, checked, and named by line where they are wrong."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from mappings.model.protocol import Condition, Protocol
from mappings.model.rules import Rule, RuleError, RuleText
from mappings.reading.routing import compile_rule
from mappings.reading.series_to_roles import SERIES_ATTRIBUTES, STUDY_ATTRIBUTES
from mappings.rules import pirads_v2_1
from middleware.errors import SettingsError

BUNDLED = Path(__file__).resolve().parents[2] / "mappings" / "protocols"
RULES = frozenset({pirads_v2_1.RULE})
MODEL_OUTPUTS = ("gland", "zones", "lesions", "scores")
"""The tensors that findings are made of (mappings/reading/tensors_to_findings.py)."""
SPACING_SHAPE = (3,)
ARTIFACT_KINDS = {
    "pacs": frozenset({"seg", "sr", "key_images", "rejection_note"}),
    "ehr": frozenset({"fhir_bundle"}),
    "ris": frozenset({"oru"}),
}
"""What each destination can be sent, by the names a protocol uses."""


@dataclass(frozen=True)
class LoadedProtocol:
    """A protocol, the text of the file it came from with its sha256, so that a result can name exactly what was
    applied, and its rules ready to be evaluated."""

    protocol: Protocol
    digest: str
    file: str
    when: tuple[tuple[RuleText, Rule], ...] = ()
    set_aside: tuple[tuple[RuleText, Rule], ...] = ()
    text: str = ""


def load_protocols(folder: Path | None = None) -> dict[str, LoadedProtocol]:
    """Every `*.yaml` of `folder` (ours where None), by protocol name. Raises SettingsError naming file and line."""
    folder = folder or BUNDLED
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise SettingsError(f"{folder}: no protocol files (*.yaml) there")
    loaded: dict[str, LoadedProtocol] = {}
    for file in files:
        one = load_protocol(file)
        if one.protocol.name in loaded:
            raise SettingsError(f"{file}: protocol {one.protocol.name} is also in {loaded[one.protocol.name].file}")
        loaded[one.protocol.name] = one
    return loaded


def replace_protocol(in_use: Mapping[str, LoadedProtocol], tried: LoadedProtocol) -> dict[str, LoadedProtocol]:
    """The protocols in use with `tried` in the place of the one of its name; a new one stands where its file name
    would put it."""
    name = tried.protocol.name
    if name in in_use:
        return {**in_use, name: tried}
    return dict(sorted({**in_use, name: tried}.items(), key=lambda item: Path(item[1].file).name))


def load_protocol(file: Path) -> LoadedProtocol:
    """One protocol file. Raises SettingsError with a line for each thing that is wrong."""
    try:
        text = file.read_text(encoding="utf-8")
        tree = yaml.compose(text)
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise SettingsError(f"{file}:{line}: cannot be read as YAML: {error.problem or error.context}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{file}: cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        what = "is empty" if values is None else f"is a {type(values).__name__}"
        raise SettingsError(f"{file}:1: must be a mapping of settings, but {what}")
    problems = [*_repeated_keys(tree, ()), *_unknown_keys(values, Protocol, ()), *_shape_problems(values)]
    if not problems:
        protocol = _ADAPTER.validate_python(values)
        problems = list(_meaning_problems(protocol))
    if problems:
        raise SettingsError("\n".join(f"{file}:{_line(tree, place)}: {text}" for place, text in problems))
    when, set_aside = (
        [(r, compile_rule(r.expression)) for r in rules] for rules in (protocol.when, protocol.set_aside)
    )
    digest = hashlib.sha256(text.encode()).hexdigest()
    return LoadedProtocol(protocol, digest, str(file), tuple(when), tuple(set_aside), text)


Place = tuple[str | int, ...]
Problem = tuple[Place, str]

_ADAPTER = TypeAdapter(Protocol)


def _shape_problems(values: Any) -> Iterator[Problem]:
    try:
        _ADAPTER.validate_python(values)
    except ValidationError as error:
        for each in error.errors():
            place = tuple(p for p in each["loc"] if not (isinstance(p, str) and p.startswith(("tuple", "function"))))
            message = "must be a list" if each["type"] == "tuple_type" else each["msg"]
            yield place, f"{'.'.join(map(str, place))}: {message}"


def _repeated_keys(node: Any, place: Place) -> Iterator[Problem]:
    """Keys that one mapping has twice: YAML keeps the last one without a word."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                yield (*place, key.value), f"{'.'.join(map(str, (*place, key.value)))}: is there twice"
            seen.add(key.value)
            yield from _repeated_keys(value, (*place, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _repeated_keys(value, (*place, index))


def _unknown_keys(values: Any, kind: Any, place: Place) -> Iterator[Problem]:
    """Keys that no field of the (nested) dataclass has: a misspelt setting must not be silently ignored."""
    schema = TypeAdapter(kind).json_schema()
    yield from _unknown_in(values, schema, schema.get("$defs", {}), place)


def _unknown_in(values: Any, schema: dict[str, Any], definitions: dict[str, Any], place: Place) -> Iterator[Problem]:
    schema = _resolved(schema, definitions)
    if isinstance(values, dict) and "properties" in schema:
        for key, value in values.items():
            if key in schema["properties"]:
                yield from _unknown_in(value, schema["properties"][key], definitions, (*place, key))
            else:
                known = ", ".join(sorted(schema["properties"]))
                yield (*place, key), f"{'.'.join(map(str, (*place, key)))}: no such setting; there are {known}"
    elif isinstance(values, list) and "items" in schema:
        for index, value in enumerate(values):
            yield from _unknown_in(value, schema["items"], definitions, (*place, index))


def _resolved(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    for choice in schema.get("anyOf", []):
        if choice.get("type") != "null":
            schema = choice
            break
    name = schema.get("$ref", "").rsplit("/", 1)[-1]
    return _resolved(definitions[name], definitions) if name else schema


def _meaning_problems(protocol: Protocol) -> Iterator[Problem]:
    """What the types cannot say: names that must exist, patterns that must compile."""
    if not protocol.match:
        yield ("match",), "match is empty: the protocol would read every study"
    for index, condition in enumerate(protocol.match):
        yield from _condition_problems(condition, STUDY_ATTRIBUTES, ("match", index))
    for section, rules in (("when", protocol.when), ("set_aside", protocol.set_aside)):
        for index, rule in enumerate(rules):
            try:
                compile_rule(rule.expression)
            except RuleError as error:
                yield (section, index, "expression"), f"{section}: {error}"
    names = [role.name for role in protocol.roles]
    for index, role in enumerate(protocol.roles):
        if not role.must:
            yield ("roles", index, "must"), f"role {role.name} must have a condition: any series would do"
        for number, condition in enumerate(role.must):
            yield from _condition_problems(condition, SERIES_ATTRIBUTES, ("roles", index, "must", number))
        for number, preference in enumerate(role.prefer):
            direction, _, attribute = preference.partition(":")
            if direction not in ("high", "low") or attribute not in SERIES_ATTRIBUTES:
                yield ("roles", index, "prefer", number), f"'{preference}' is not high:ATTRIBUTE or low:ATTRIBUTE"
        if names.count(role.name) > 1:
            yield ("roles", index, "name"), f"role {role.name} is there twice"
    yield from _reference_problems(protocol, names)


def _reference_problems(protocol: Protocol, names: list[str]) -> Iterator[Problem]:
    for index, tensor in enumerate(protocol.model.inputs):
        if tensor.role and tensor.role not in names:
            yield ("model", "inputs", index, "role"), f"role '{tensor.role}' is not among {', '.join(names)}"
        if not tensor.role and tensor.shape != SPACING_SHAPE:
            yield ("model", "inputs", index), f"input {tensor.name} has no role, so it is the spacing, of shape [3]"
    outputs = sorted(tensor.name for tensor in protocol.model.outputs)
    if outputs != sorted(MODEL_OUTPUTS):
        yield ("model", "outputs"), f"outputs are {', '.join(outputs)}; they must be {', '.join(MODEL_OUTPUTS)}"
    for key in ("reference_role", "adc_role"):
        if getattr(protocol.measure, key) not in names:
            yield ("measure", key), f"role '{getattr(protocol.measure, key)}' is not among {', '.join(names)}"
            return
    reference = protocol.role(protocol.measure.reference_role)
    if not reference.required:
        yield ("measure", "reference_role"), f"role {reference.name} carries the grid and must be required"
    if "accept" in (reference.geometry.missing_slices, reference.geometry.uneven_spacing):
        yield ("roles",), f"role {reference.name} carries the grid: its slices may be neither missing nor uneven"
    if protocol.rule not in RULES:
        yield ("rule",), f"no rule '{protocol.rule}'; there are {', '.join(sorted(RULES))}"
    for destination, known in ARTIFACT_KINDS.items():
        for number, name in enumerate(getattr(protocol.outputs, destination)):
            if name not in known:
                yield (
                    ("outputs", destination, number),
                    f"'{name}' cannot go to {destination}; it takes {', '.join(sorted(known))}",
                )


def _condition_problems(condition: Condition, attributes: Any, place: Place) -> Iterator[Problem]:
    if condition.any is not None:
        if condition.attribute:
            yield place, "a condition has either an attribute or 'any', not both"
        if not condition.any:
            yield (*place, "any"), "'any' is empty, so the condition never holds"
        if set(condition.say) & set("{}"):
            yield (*place, "say"), "may hold no braces: 'any' looks at several values"
        for index, each in enumerate(condition.any):
            yield from _condition_problems(each, attributes, (*place, "any", index))
        return
    if condition.attribute not in attributes:
        yield (*place, "attribute"), f"no attribute '{condition.attribute}'; there are {', '.join(sorted(attributes))}"
    comparisons = ("any_of", "none_of", "at_least", "at_most", "matches", "not_matches")
    if not any(getattr(condition, name) is not None for name in comparisons):
        yield place, f"the condition compares nothing; add one of {', '.join(comparisons)}"
    for key in ("matches", "not_matches"):
        try:
            re.compile(getattr(condition, key) or "")
        except re.error as error:
            yield (*place, key), f"not a regular expression: {error}"
    try:
        condition.say.format(value="")
    except (KeyError, IndexError, ValueError):
        yield (*place, "say"), "may hold {value} and no other braces"


def _line(tree: Any, place: Place) -> int:
    """The line (from 1) of the deepest part of `place` that the file has."""
    node = tree
    line: int = node.start_mark.line + 1 if node else 1
    for part in place:
        if isinstance(node, yaml.MappingNode):
            pairs = [(k, v) for k, v in node.value if k.value == part]
            if not pairs:
                break
            line, node = pairs[0][0].start_mark.line + 1, pairs[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line
