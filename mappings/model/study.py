"""Images: what a study holds, and one series as a volume in patient space.

All positions and directions are DICOM patient coordinates (LPS): x grows to the patient's left, y to the
back, z to the head, in millimetres.
"""

from dataclasses import dataclass, field
from datetime import date

import numpy as np
import numpy.typing as npt

Vector = tuple[float, float, float]


@dataclass(frozen=True)
class PatientIdentity:
    """Who the images say the patient is. `sex` is DICOM's M, F, O or empty."""

    patient_id: str
    issuer: str = ""
    name: str = ""
    birth_date: date | None = None
    sex: str = ""


@dataclass(frozen=True)
class Instance:
    """One SOP instance's header: identity and the geometry that places it. `file` names it in the spool."""

    sop_instance_uid: str
    sop_class_uid: str
    file: str
    patient_id: str
    frame_of_reference_uid: str = ""
    instance_number: int | None = None
    rows: int = 0
    columns: int = 0
    number_of_frames: int = 1
    pixel_spacing_mm: tuple[float, float] | None = None
    position_mm: Vector | None = None
    orientation: tuple[float, float, float, float, float, float] | None = None
    b_value_s_mm2: float | None = None


@dataclass(frozen=True)
class Series:
    """One series: the attributes that routing and role selection look at, and its instances in file order.

    `echo_time_ms`, `repetition_time_ms`, `slice_thickness_mm` are the first instance's. `acquired` is its acquisition
    date and time as stated (DICOM gives no zone here), good for ordering series and nothing else.
    """

    series_instance_uid: str
    modality: str
    instances: tuple[Instance, ...]
    series_number: int | None = None
    description: str = ""
    protocol_name: str = ""
    sequence_name: str = ""
    scanning_sequence: tuple[str, ...] = ()
    image_type: tuple[str, ...] = ()
    body_part: str = ""
    acquisition_type: str = ""
    contrast_agent: str = ""
    echo_time_ms: float | None = None
    repetition_time_ms: float | None = None
    slice_thickness_mm: float | None = None
    manufacturer: str = ""
    device_model: str = ""
    field_strength_t: float | None = None
    acquired: str = ""


@dataclass(frozen=True)
class InputProblem:
    """Something wrong with the input: a code for machines, the instance or series it is about, and a
    sentence for people (without patient data)."""

    code: str
    where: str
    message: str


@dataclass(frozen=True)
class Study:
    """Everything known of one imaging study from its image headers."""

    study_instance_uid: str
    patient: PatientIdentity
    series: tuple[Series, ...]
    accession_number: str = ""
    accession_issuer: str = ""
    study_id: str = ""
    study_date: date | None = None
    study_time: str = ""
    description: str = ""
    referring_physician: str = ""
    patient_age: str = ""
    institution: str = ""
    problems: tuple[InputProblem, ...] = ()

    def find_series(self, series_instance_uid: str) -> Series:
        """The series with this UID; KeyError where the study has none."""
        for series in self.series:
            if series.series_instance_uid == series_instance_uid:
                return series
        raise KeyError(series_instance_uid)


@dataclass(frozen=True)
class Geometry:
    """A regular grid of voxels in patient space.

    `affine` (4x4 row-major) takes `(column, row, slice, 1)` indices to LPS mm of the voxel's centre.
    `shape` is `(slices, rows, columns)`, i.e. the shape of the array.
    """

    shape: tuple[int, int, int]
    affine: tuple[tuple[float, float, float, float], ...]
    frame_of_reference_uid: str

    @property
    def matrix(self) -> npt.NDArray[np.float64]:
        """`affine` as a 4x4 array."""
        return np.array(self.affine, dtype=np.float64)

    @property
    def spacing_mm(self) -> Vector:
        """Voxel size `(z, y, x)` in mm."""
        columns = np.linalg.norm(self.matrix[:3, :3], axis=0)
        return (float(columns[2]), float(columns[1]), float(columns[0]))

    @property
    def normal(self) -> npt.NDArray[np.float64]:
        """Unit vector along which slices ascend: row direction x column direction."""
        axis = self.matrix[:3, 2]
        return axis / np.linalg.norm(axis)

    def to_lps_mm(self, zyx: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """LPS mm of array indices `(n, 3)` given as (z, y, x), fractional indices allowed."""
        index = np.atleast_2d(np.asarray(zyx, dtype=np.float64))[:, ::-1]
        return index @ self.matrix[:3, :3].T + self.matrix[:3, 3]


@dataclass(frozen=True, eq=False)
class Volume:
    """One series (or one b-value of it) as an array `(z, y, x)` float32 with its grid.

    `sop_instance_uids[z]` is the instance that slice z came from; empty after resampling.
    """

    array: npt.NDArray[np.float32]
    geometry: Geometry
    series_instance_uid: str
    sop_instance_uids: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())
