"""What the hospital's messages say, remembered: the messages themselves, orders, patients and reports."""

from datetime import datetime

from sqlalchemy import JSON, Column, LargeBinary
from sqlmodel import Field, SQLModel

from middleware.store.tables import time_field


class HeardMessage(SQLModel, table=True):
    """One HL7 message as it came, kept before it is acknowledged; or one version of a FHIR resource (`format` is hl7 or
    fhir), as a Bundle with what it refers to. `message_key` is the digest of its content (an HL7 message's holds sender
    and control id; of a Bundle the resource alone counts), so a resend is the same message, whatever address it comes
    from. `state` is received, applied, refused (a contradiction that a person settles), unhandled (kept, nothing is
    done with it) or unreadable; `notes` say why."""

    __tablename__ = "heard_message"
    position: int | None = Field(default=None, primary_key=True)
    message_key: str = Field(unique=True)
    sender: str
    control_id: str = Field(index=True)
    message_type: str
    format: str = "hl7"
    raw: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    state: str = Field(default="received", index=True)
    notes: list[str] = Field(default_factory=list, sa_column=Column(JSON, nullable=False))
    received_at: datetime = time_field()
    repeats: int = 0


class RefusedNumber(SQLModel, table=True):
    """A number that a refused message names, so that the messages about an order are found that changed nothing.
    `kind` is the column of `OrderRecord` that holds such numbers."""

    __tablename__ = "refused_number"
    number: str = Field(primary_key=True)
    kind: str = Field(primary_key=True)
    position: int = Field(primary_key=True)


class OrderRecord(SQLModel, table=True):
    """One imaging order as far as messages told it. Any number may be empty; `status` never goes back.
    `held_by` is the format (hl7, fhir) of the message that put it on hold, since only the same system may resume it;
    `handed_at` is when its study was last found in the PACS and heard of, `look_after` when to look for it again."""

    __tablename__ = "order_record"
    order_id: str = Field(primary_key=True)
    placer_order_number: str = Field(default="", index=True)
    filler_order_number: str = Field(default="", index=True)
    accession_number: str = Field(default="", index=True)
    study_instance_uid: str = Field(default="", index=True)
    patient_id: str = ""
    patient_issuer: str = ""
    status: str = ""
    is_on_hold: bool = False
    held_by: str = ""
    procedure_code: str = ""
    procedure_scheme: str = ""
    procedure_meaning: str = ""
    priority: str = ""
    reason: str = ""
    requester: str = ""
    handed_at: datetime | None = time_field(nullable=True)
    look_after: datetime | None = time_field(nullable=True, index=True)
    updated_at: datetime = time_field()


class PatientRecord(SQLModel, table=True):
    """One patient identifier, of one authority (`issuer`; empty where no message stated it). `merged_into` is the key
    of the patient that a merge moved this one to; it never empties."""

    __tablename__ = "patient_record"
    patient_key: str = Field(primary_key=True)
    patient_id: str = Field(index=True)
    issuer: str = ""
    name: str = ""
    birth_date: str = ""
    sex: str = ""
    merged_into: str = Field(default="", index=True)
    updated_at: datetime = time_field()


class ReportRecord(SQLModel, table=True):
    """The radiologist's own report on an order, its latest state. `told_at` is when the result of its study was told of
    it."""

    __tablename__ = "report_record"
    report_key: str = Field(primary_key=True)
    placer_order_number: str = Field(default="", index=True)
    filler_order_number: str = Field(default="", index=True)
    accession_number: str = Field(default="", index=True)
    study_instance_uid: str = Field(default="", index=True)
    patient_id: str = ""
    patient_issuer: str = ""
    status: str = ""
    text: str = ""
    reported_at: datetime | None = time_field(nullable=True)
    updated_at: datetime = time_field(index=True)
    told_at: datetime | None = time_field(nullable=True)
