"""Settings: `wetread.yaml` and `WETREAD_*` environment variables, typed and checked at start.

A nested value is set from the environment with a double underscore: `WETREAD_PACS__TOKEN`. Environment wins
over the file. Secrets belong in the environment or in files named by `*_file` settings, never in the YAML.
"""

import difflib
import os
import socket
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SecretStr,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    NestedSecretsSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)
from pydantic_settings import SettingsError as UnreadableVariable

from connectors.dicomweb.config import DicomwebConfig
from connectors.fhir.config import FhirConfig
from connectors.mllp.config import MllpConfig
from connectors.mllp.listener_config import MllpListenerConfig
from connectors.orthanc.config import OrthancConfig
from connectors.triton.config import TritonConfig
from mappings.inputs.fhir_to_event import NumberSystems
from middleware.errors import SettingsError

DEFAULT_FILE = Path("wetread.yaml")
SECRETS = frozenset({"token", "password", "key_password", "client_key_password"})
"""Settings that come from the environment or from files only, whatever system they belong to."""


class FolderPacs(BaseModel):
    """A folder of DICOM files in the place of a PACS, for trying Wetread without one."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    folder: Path = Field(description="Folder that holds the images and takes the results.")


_SERVER, _FOLDER = "dicomweb-server", "image-folder"


def _pacs_kind(value: Any) -> str:
    """Which of the two kinds of PACS is meant, so that only its own errors are shown."""
    return _FOLDER if isinstance(value, FolderPacs) or (isinstance(value, dict) and "folder" in value) else _SERVER


PacsSettings = Annotated[
    Annotated[DicomwebConfig, Tag(_SERVER)] | Annotated[FolderPacs, Tag(_FOLDER)], Discriminator(_pacs_kind)
]


class EhrSettings(FhirConfig):
    """The EHR's FHIR server, and which identifier system its patients are looked up by."""

    patient_identifier_system: str = Field(
        default="", description="FHIR identifier system of the DICOM PatientID; empty: any system."
    )


class RisSettings(MllpConfig):
    """The RIS' HL7 listener and how messages to it are addressed (MSH-5, MSH-6, MSH-11)."""

    receiving_application: str = Field(default="RIS", max_length=227)
    receiving_facility: str = Field(default="HOSPITAL", max_length=227)
    processing_id: Literal["P", "T", "D"] = "P"


class HearingSettings(MllpListenerConfig):
    """Our own HL7 listener: where the RIS and the EHR send orders, patients and reports."""

    processing_ids: tuple[Literal["P", "T", "D"], ...] = Field(
        default=("P",), description="MSH-11 values that are accepted; T and D only on a test system."
    )


EventResource = Literal["Patient", "ServiceRequest", "ImagingStudy"]


class EhrEventSettings(BaseModel):
    """How Wetread hears from the EHR (FHIR Subscriptions) that orders and imaging studies are new or changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    callback_url: str = Field(
        description="Where the EHR reaches us: the address of this API, ending in /fhir/notifications."
    )
    token: SecretStr = Field(min_length=16, description="What the EHR has to send with each callback (Bearer).")
    kind: Literal["classic", "backport"] = Field(
        default="classic", description="Subscriptions as in R4, or of the Subscriptions R5 Backport IG 1.1.0."
    )
    resources: tuple[EventResource, ...] = Field(
        default=("Patient", "ServiceRequest", "ImagingStudy"),
        min_length=1,
        description="What is read: merges of patients, orders, imaging studies.",
    )
    filters: dict[EventResource, str] = Field(
        default={}, description="Search parameters that narrow a resource, e.g. ServiceRequest: category=..."
    )
    topics: dict[EventResource, str] = Field(
        default={}, description="Backport: canonical URL of the topic of each resource (but Patient)."
    )
    heartbeat_s: int = Field(default=60, ge=0, description="Backport: a sign of life so often; 0: none.")
    timeout_s: int = Field(default=30, ge=0, description="Backport: how long the EHR shall try one callback.")
    poll_s: float = Field(default=60.0, gt=0, description="So often the EHR is read without a callback, too.")
    check_s: float = Field(default=300.0, gt=0, description="So often it is made sure that subscriptions work.")
    overlap_s: float = Field(
        default=300.0, ge=0, description="Each reading begins so long before the end of the one before."
    )
    first_look_back_h: float = Field(
        default=24.0, ge=0, description="The very first reading begins so long before the EHR's latest change."
    )
    accession_system: str = Field(
        default="", description="Identifier system of accession numbers that have no type; empty: type ACSN only."
    )
    placer_system: str = Field(default="", description="The same of placer order numbers (type PLAC).")
    filler_system: str = Field(default="", description="The same of filler order numbers (type FILL).")

    @field_validator("callback_url")
    @classmethod
    def _whole_address(cls, url: str) -> str:
        parts = urlsplit(url)
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or not parts.path.endswith("/fhir/notifications")
        ):
            raise ValueError("must be http://host[:port]/fhir/notifications or https://host[:port]/fhir/notifications")
        return url

    @model_validator(mode="after")
    def _topic_of_each(self) -> "EhrEventSettings":
        missing = [kind for kind in self.resources if kind != "Patient" and kind not in self.topics]
        if self.kind == "backport" and missing:
            raise ValueError(f"kind backport needs topics for {' and '.join(missing)}")
        return self


class SiteSettings(BaseModel):
    """Who we are on the wire, and the zone of times that state none."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    sending_application: str = Field(default="WETREAD", max_length=227)
    sending_facility: str = Field(default="HOSPITAL", max_length=227)
    time_zone: str = Field(default="UTC", description="IANA name, e.g. Europe/Amsterdam.")

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (KeyError, ValueError, OSError) as error:
            raise ValueError(f"'{name}' is not an IANA time zone such as Europe/Amsterdam") from error
        return name

    issuers: tuple[tuple[str, ...], ...] = Field(
        default=(),
        description="Assigning authorities of patient ids: each with all its names (DICOM, HL7 PID-3.4, FHIR).",
    )


class PacsWatchSettings(BaseModel):
    """Watches the PACS for studies that are new or have changed (QIDO-RS)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    interval_s: float = Field(default=10.0, gt=0, description="Time between two looks at the studies of the last days.")
    recent_days: int = Field(default=1, ge=0, description="Study dates so many days back are looked at each time.")
    look_back_days: int = Field(
        default=7, ge=0, description="Study dates so many days before the last look are looked at now and then."
    )
    look_back_every_s: float = Field(default=900.0, gt=0, description="How often that is.")
    filters: dict[str, str] = Field(
        default_factory=dict, description="QIDO attributes that studies must match, e.g. ModalitiesInStudy: MR."
    )


class OrthancSettings(OrthancConfig):
    """Orthanc's log of changes, beside or instead of looking for changed studies by QIDO-RS."""

    interval_s: float = Field(default=2.0, gt=0, description="Time between two looks at the log.")


class CompletenessSettings(BaseModel):
    """When a study that arrives is read, unless somebody says that it is complete."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    quiet_s: float = Field(
        default=30.0, ge=0, description="What a protocol requires is there, and so long none of it changed: read."
    )
    longest_wait_s: float = Field(
        default=900.0, ge=0, description="So long nothing changed and something is missing: conclude with the reason."
    )
    look_every_s: float = Field(default=5.0, gt=0, description="Shortest time between two looks at one study.")


class ApiSettings(BaseModel):
    """Where `wetread serve` listens."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    host: str = "127.0.0.1"
    port: int = Field(default=8040, ge=0, le=65535)
    token: SecretStr | None = Field(
        default=None, description="Bearer token of requests that change deliveries; not set: those are not offered."
    )


class RetrySettings(BaseModel):
    """How long a reading keeps trying a system that may come back: waits grow from first to longest."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    attempts: int = Field(default=12, ge=1, le=1000)
    first_wait_s: float = Field(default=1.0, gt=0)
    longest_wait_s: float = Field(default=300.0, gt=0)

    def wait_s(self, attempt: int, asked_s: float | None = None) -> float:
        """Seconds to wait after attempt number `attempt` (from 1): doubled each time, at least what the peer asked."""
        return _grown_s(self.first_wait_s, attempt, self.longest_wait_s, asked_s)


class DestinationSettings(BaseModel):
    """How results go to one destination: how many at a time, how fast, how long, and what happens while it is down."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    concurrency: int = Field(default=2, ge=1, description="Results under way at one time, over all workers.")
    per_minute: int = Field(default=0, ge=0, description="Results started in a minute at most; 0: no limit.")
    first_wait_s: float = Field(default=1.0, gt=0, description="Wait after the first try; then twice as long each.")
    longest_wait_s: float = Field(default=300.0, gt=0, description="No wait grows beyond this, unless asked for.")
    give_up_after_s: float = Field(
        default=259200.0, ge=0, description="A delivery that was tried in vain for so long is dead (3 days)."
    )
    down_after: int = Field(default=3, ge=1, description="Failures in a row after which it counts as down.")
    probe_every_s: float = Field(default=30.0, gt=0, description="How often it is probed while it is down.")
    wait_for_ambiguous: bool = Field(
        default=False, description="Later results of an accession wait until a person settled an ambiguous one."
    )

    def wait_s(self, attempt: int, asked_s: float | None = None) -> float:
        """Seconds to wait after attempt number `attempt` (from 1): doubled each time, at least what the peer asked."""
        return _grown_s(self.first_wait_s, attempt, self.longest_wait_s, asked_s)

    def probe_wait_s(self, failures: int) -> float:
        """Seconds to the next probe after so many failures in a row: a destination that answers the probe and not
        what is sent to it is tried more and more seldom."""
        longest_s = max(self.longest_wait_s, self.probe_every_s)
        return _grown_s(self.probe_every_s, failures - self.down_after + 1, longest_s)


class PacsDeliverySettings(DestinationSettings):
    """Results to the PACS, which must show by QIDO-RS what it says that it stored."""

    confirm_within_s: float = Field(
        default=600.0, ge=0, description="What QIDO-RS does not show so long after it was stored is ambiguous."
    )


class RisDeliverySettings(DestinationSettings):
    """Results to the RIS: one outstanding message unless told otherwise."""

    concurrency: int = Field(default=1, ge=1, description="Results under way at one time, over all workers.")


class DeliverSettings(BaseModel):
    """How results go out, destination by destination."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    pacs: PacsDeliverySettings = PacsDeliverySettings()
    ehr: DestinationSettings = DestinationSettings()
    ris: RisDeliverySettings = RisDeliverySettings()

    def to(self, destination: str) -> DestinationSettings:
        """The settings of one destination."""
        found: DestinationSettings = getattr(self, destination)
        return found


def _grown_s(first_s: float, attempt: int, longest_s: float, asked_s: float | None = None) -> float:
    return max(min(first_s * 2.0 ** min(max(attempt - 1, 0), 30), longest_s), asked_s or 0.0)


class WorkersSettings(BaseModel):
    """How the processes on one database know that another one has died."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    heartbeat_s: float = Field(default=1.0, gt=0, le=60, description="How often a process says that it lives.")
    dead_after_s: float = Field(
        default=10.0, gt=0, description="A process silent for so long is dead; the living take over its work."
    )

    @model_validator(mode="after")
    def _hears_several_beats(self) -> Self:
        if self.dead_after_s < 3 * self.heartbeat_s:
            raise ValueError("dead_after_s must be at least three times heartbeat_s")
        return self


class StorageSettings(BaseModel):
    """When the disk counts as full: before it is, so that what was begun can be finished."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    min_free_mib: int = Field(
        default=512, ge=0, description="With less room than this nothing new is accepted or fetched. 0: never looks."
    )


class RetentionSettings(BaseModel):
    """What is removed by itself, and when. What is still needed stays, however old it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    every_hours: float = Field(default=1.0, gt=0, description="Time between two prunings by `serve` and `worker`.")
    spool_hours: float = Field(default=24.0, ge=0, description="Images of a study, so long after its reading ended.")
    artifacts_days: float = Field(
        default=90.0, ge=2, description="What was made and not released, or was replaced by a newer revision."
    )
    released_days: float | None = Field(
        default=None, ge=2, description="What was released last of a study; empty: for good."
    )
    inbox_days: float = Field(default=30.0, ge=1, description="The text of HL7 messages that were applied.")
    workflow_days: float = Field(default=14.0, ge=1, description="The workflow engine's history of what has ended.")
    events_days: float = Field(
        default=365.0, ge=30, description="Events and step times; the same event sent again later is a new one."
    )


class Settings(BaseSettings):
    """Everything a site sets. With nothing set, Wetread works on folders with the bundled model."""

    model_config = SettingsConfigDict(
        env_prefix="WETREAD_", env_nested_delimiter="__", extra="forbid", frozen=True, yaml_file_encoding="utf-8"
    )

    data_dir: Path = Field(default=Path("wetread-data"), description="Databases, spool and artifacts live here.")
    database_url: str = Field(
        default="", repr=False, description="postgresql://... (may hold a password); empty: SQLite files in data_dir."
    )
    artifacts_url: str = Field(default="", description="fsspec URL of the artifact store; empty: a folder in data_dir.")
    protocols_dir: Path | None = Field(default=None, description="Folder of the site's protocols, instead of ours.")
    executor_id: str = Field(default="", description="Stable, unique name of this process; empty: the host's name.")
    concurrent_readings: int = Field(default=2, ge=1)
    concurrent_inferences: int | None = Field(
        default=None, ge=1, description="Questions to the model at one time, over all processes; empty: no limit."
    )
    site: SiteSettings = SiteSettings()
    api: ApiSettings = ApiSettings()
    retry: RetrySettings = RetrySettings()
    deliver: DeliverSettings = DeliverSettings()
    workers: WorkersSettings = WorkersSettings()
    storage: StorageSettings = StorageSettings()
    retention: RetentionSettings = RetentionSettings()
    pacs: PacsSettings | None = None
    ehr: EhrSettings | None = None
    ehr_events: EhrEventSettings | None = Field(default=None, description="None: nothing is heard from the EHR.")
    ris: RisSettings | None = None
    pacs_watch: PacsWatchSettings | None = Field(default=None, description="None: the PACS is not watched.")
    orthanc_changes: OrthancSettings | None = Field(default=None, description="None: the log is not read.")
    completeness: CompletenessSettings = CompletenessSettings()
    hl7_listener: HearingSettings | None = Field(default=None, description="None: no HL7 messages are heard.")
    triton: TritonConfig | None = Field(default=None, description="None: the bundled Triton is started for the run.")

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, url: str) -> str:
        if url and not url.startswith(("postgresql://", "sqlite:///")):
            raise ValueError("must start with postgresql:// or sqlite:///")
        return url

    @field_validator("ehr_events")
    @classmethod
    def _of_an_ehr(cls, events: EhrEventSettings | None, info: ValidationInfo) -> EhrEventSettings | None:
        if events is not None and info.data.get("ehr", "wrong") is None:
            raise ValueError("there is no EHR to hear from: set ehr.url")
        return events

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments win over the environment, that over files of secrets, and all of them over the YAML file."""
        yaml_source = YamlConfigSettingsSource(settings_cls, yaml_file=os.environ.get("WETREAD_CONFIG") or DEFAULT_FILE)
        folder = os.environ.get("WETREAD_SECRETS_DIR")
        if not folder:
            return init_settings, env_settings, yaml_source
        secrets = NestedSecretsSettingsSource(
            file_secret_settings, secrets_dir=folder, secrets_prefix="", secrets_nested_delimiter="__"
        )
        return init_settings, env_settings, secrets, yaml_source

    @property
    def store_url(self) -> str:
        """SQLAlchemy URL of Wetread's own tables."""
        if self.database_url.startswith("postgresql://"):
            return self.database_url.replace("postgresql://", "postgresql+psycopg://", 1)
        return self.database_url or f"sqlite:///{self.data_dir.absolute()}/wetread.sqlite"

    @property
    def workflow_url(self) -> str:
        """URL of the workflow database (DBOS)."""
        if self.database_url.startswith("postgresql://"):
            return self.database_url
        return f"sqlite:///{self.data_dir.absolute()}/workflow.sqlite"

    @property
    def number_systems(self) -> NumberSystems:
        """The identifier systems of the EHR's numbers."""
        patient = self.ehr.patient_identifier_system if self.ehr else ""
        if self.ehr_events is None:
            return NumberSystems(patient=patient)
        told = self.ehr_events
        return NumberSystems(told.accession_system, told.placer_system, told.filler_system, patient)

    @property
    def executor_name(self) -> str:
        """The name of this process among all that work on its database."""
        return self.executor_id or socket.gethostname()

    @property
    def artifacts_place(self) -> str:
        """fsspec URL or path of the artifact store."""
        return self.artifacts_url or str(self.data_dir.absolute() / "artifacts")

    @property
    def zone(self) -> ZoneInfo:
        """The site's time zone."""
        return ZoneInfo(self.site.time_zone)


def load_settings(file: Path | None = None) -> Settings:
    """The settings from `file` (or WETREAD_CONFIG, or wetread.yaml where there is one) and the environment.

    Raises SettingsError with one readable line for each thing that is wrong.
    """
    named = str(file or os.environ.get("WETREAD_CONFIG") or "")
    if named and not Path(named).is_file():
        raise SettingsError(f"settings file {named} is not there")
    where = named or str(DEFAULT_FILE)
    secrets_folder = os.environ.get("WETREAD_SECRETS_DIR")
    if secrets_folder and not Path(secrets_folder).is_dir():
        raise SettingsError(f"WETREAD_SECRETS_DIR: folder {secrets_folder} is not there")
    _refuse_misspelt_variables()
    _refuse_odd_file(Path(where))
    previous = os.environ.get("WETREAD_CONFIG")
    os.environ["WETREAD_CONFIG"] = where
    try:
        return Settings()
    except ValidationError as error:
        lines = [f"{where} or WETREAD_*: {_explain(e['loc'], e['type'], e['msg'])}" for e in error.errors()]
        # Without the cause: pydantic's own text quotes the values, and a value may be a secret.
        raise SettingsError("\n".join(dict.fromkeys(lines))) from None
    except UnreadableVariable as error:
        raise SettingsError(f"WETREAD_*: {error}; it must be JSON") from None
    finally:
        if previous is None:
            del os.environ["WETREAD_CONFIG"]
        else:
            os.environ["WETREAD_CONFIG"] = previous


def _explain(place: tuple[int | str, ...], kind: str, message: str) -> str:
    words = "there is no such setting" if kind == "extra_forbidden" else message.removeprefix("Value error, ")
    return f"{'.'.join(str(p) for p in place if p not in (_SERVER, _FOLDER))}: {words}"


def _refuse_misspelt_variables() -> None:
    """Raise SettingsError for a variable that is nearly a setting. Other WETREAD_* variables are let be:
    Kubernetes adds its own for a service of this name."""
    known = [name.upper() for name in Settings.model_fields]
    for variable in sorted(os.environ):
        name = variable.upper().removeprefix("WETREAD_").partition("__")[0]
        if not variable.upper().startswith("WETREAD_") or name in known:
            continue
        if near := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
            raise SettingsError(f"{variable}: there is no such setting; did you mean WETREAD_{near[0]}?")


def _refuse_odd_file(file: Path) -> None:
    """Raise SettingsError unless the file, where there is one, is YAML that maps names to values."""
    if not file.is_file():
        return
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise SettingsError(f"{file}:{line}: not valid YAML: {error.problem or error.context}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{file}: cannot be read as YAML ({type(error).__name__})") from None
    _refuse_secrets(values, file)
    if values is not None and not (isinstance(values, dict) and all(isinstance(key, str) for key in values)):
        raise SettingsError(f"{file}:1: must be a mapping of settings, such as `data_dir: /var/lib/wetread`")


def _refuse_secrets(values: object, file: Path) -> None:
    """Raise SettingsError for a secret in the YAML file, which ends up in backups and repositories."""
    for section, inner in values.items() if isinstance(values, dict) else ():
        for name in inner if isinstance(inner, dict) else ():
            if name in SECRETS:
                variable = f"WETREAD_{str(section).upper()}__{name.upper()}"
                where = f"set {variable}, or a file {section}__{name} in the folder WETREAD_SECRETS_DIR"
                raise SettingsError(f"{file}: {section}.{name} is a secret and may not stand in this file; {where}")
