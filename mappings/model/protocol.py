"""A protocol: which studies, which series for which role, which model, what to measure, which rule scores,
which outputs go where. One YAML file that a site can read and edit (mappings/protocols/*.yaml)."""

from dataclasses import dataclass, field
from typing import Literal

from mappings.model.codes import Code
from mappings.model.rules import RuleText

Scalar = str | float | int | bool


@dataclass(frozen=True)
class Condition:
    """One test of one attribute. Exactly one comparison is set; `any` holds alternatives instead.

    `attribute` is a name from `ATTRIBUTES` of the place that evaluates it (a series or a study). An attribute
    that the images do not state counts as `missing` says.
    """

    attribute: str = ""
    any_of: tuple[Scalar, ...] | None = None
    none_of: tuple[Scalar, ...] | None = None
    at_least: float | None = None
    at_most: float | None = None
    matches: str | None = None
    not_matches: str | None = None
    any: tuple["Condition", ...] | None = None
    missing: Literal["fail", "pass"] = "fail"
    say: str = ""


@dataclass(frozen=True)
class GeometryPolicy:
    """What a series in this role may be like. `refuse` refuses the study; `accept` uses the series and says
    so in the findings; for several b-values `highest` uses the instances of the highest one."""

    missing_slices: Literal["refuse", "accept"] = "refuse"
    duplicate_slices: Literal["refuse", "first"] = "refuse"
    uneven_spacing: Literal["refuse", "accept"] = "refuse"
    several_b_values: Literal["refuse", "highest"] = "refuse"
    spacing_tolerance_mm: float = 0.1
    minimum_slices: int = 3


@dataclass(frozen=True)
class Role:
    """One role that a series plays. All of `must` hold; the first `prefer` that tells two candidates apart
    decides, `high:`/`low:` attribute names prefer the larger or smaller number."""

    name: str
    title: str
    must: tuple[Condition, ...]
    prefer: tuple[str, ...] = ()
    required: bool = True
    geometry: GeometryPolicy = field(default_factory=GeometryPolicy)


@dataclass(frozen=True)
class Tensor:
    """One tensor of the model: its name and datatype at the server (Triton's words), and for an input the
    role whose volume fills it (`spacing` is filled from the reference grid)."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    role: str = ""
    allow_nan: bool = False


@dataclass(frozen=True)
class Model:
    """The model behind the tensors, pinned to a version."""

    name: str
    version: str
    manufacturer: str
    description: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    deadline_s: float = 120.0
    priority: int = 0


@dataclass(frozen=True)
class PsaPolicy:
    """Which PSA may be used for the density, and with which gland volume."""

    maximum_age_days: int = 365
    volume: Literal["ellipsoid", "voxels"] = "ellipsoid"


@dataclass(frozen=True)
class Measure:
    """What to measure: the role whose grid everything lies on, the role that holds ADC, and which PSA counts."""

    reference_role: str
    adc_role: str
    psa: PsaPolicy = field(default_factory=PsaPolicy)


@dataclass(frozen=True)
class Outputs:
    """What is sent to each destination, by artifact name, and the report template."""

    pacs: tuple[str, ...] = ()
    ehr: tuple[str, ...] = ()
    ris: tuple[str, ...] = ()
    template: str = "prostate_mri"


@dataclass(frozen=True)
class Protocol:
    """One reading protocol, complete. A study that `match` lets in is read only if every rule of `when` holds, and
    not if one of `set_aside` does (QA phantoms, test patients); rules also see order and EHR context."""

    name: str
    version: str
    title: str
    match: tuple[Condition, ...]
    roles: tuple[Role, ...]
    model: Model
    measure: Measure
    rule: str
    outputs: Outputs
    procedure: Code
    when: tuple[RuleText, ...] = ()
    set_aside: tuple[RuleText, ...] = ()

    def role(self, name: str) -> Role:
        """The role of this name; KeyError where the protocol has none."""
        for role in self.roles:
            if role.name == name:
                return role
        raise KeyError(name)
