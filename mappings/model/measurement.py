"""What was measured, and where to look.

A value is rounded once, here: `Measurement.text` is the string that every rendering shows.
"""

from dataclasses import dataclass

from mappings.model.codes import Code


@dataclass(frozen=True)
class Measurement:
    """One number: `key` names it inside its finding (`volume`, `adc_mean`), `concept` codes the quantity,
    `unit` is UCUM, `method` how it was made, `decimals` the digits that are shown and sent."""

    key: str
    label: str
    concept: Code
    value: float
    unit: Code
    decimals: int
    method: Code | None = None
    derivation: Code | None = None

    @property
    def text(self) -> str:
        """The number as every rendering writes it."""
        return f"{self.value:.{self.decimals}f}"


@dataclass(frozen=True)
class Evidence:
    """Where to look: a slice of a source series that shows the finding. `frame_index` counts from 0 on the
    reference (T2) grid, ascending along the slice normal."""

    role: str
    series_instance_uid: str
    sop_instance_uid: str
    frame_index: int
