"""Settings of our own MLLP listener: where it listens, whom it lets in, how much it takes."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, FilePath, IPvAnyNetwork, SecretStr, model_validator

_MIB = 1 << 20
_TLS_ONLY = ("cert_file", "key_file", "key_password", "ca_file", "allowed_subjects")


class MllpListenerConfig(BaseModel):
    """One MLLP listener. Without `tls` anyone who reaches the port and passes `allowed_peers` is heard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(default="mllp-listener", min_length=1, description="What logs and messages call this listener.")
    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on; 0.0.0.0 or :: for all.")
    port: int = Field(default=2575, ge=0, le=65535, description="TCP port; 0 takes any free one.")
    tls: bool = Field(default=False, description="Speak TLS 1.2 or newer; plain connections are refused.")
    cert_file: FilePath | None = Field(default=None, description="PEM certificate (chain) of this listener.")
    key_file: FilePath | None = Field(default=None, description="PEM key, if not in cert_file.")
    key_password: SecretStr | None = Field(default=None, description="Password of that key.")
    ca_file: FilePath | None = Field(default=None, description="PEM file of the CAs of the senders (mutual TLS).")
    require_client_cert: bool = Field(
        default=True, description="With ca_file: refuse a sender without a certificate. Without ca_file: no meaning."
    )
    allowed_peers: tuple[IPvAnyNetwork, ...] = Field(
        default=(), description="Addresses and CIDR ranges that may connect; empty for any."
    )
    allowed_subjects: tuple[str, ...] = Field(
        default=(),
        description="Names of client certificates (the CN or one of the SANs, whole, in any case) that may send; "
        "empty for every certificate that ca_file vouches for.",
    )
    max_message_bytes: int = Field(default=32 * _MIB, gt=0, description="A larger message ends its connection.")
    max_buffered_bytes: int = Field(
        default=256 * _MIB, gt=0, description="All messages held at once; beyond it the largest unfinished one goes."
    )
    max_connections: int = Field(
        default=256, gt=0, description="Connections at one time; beyond it the longest idle one has to go."
    )
    idle_timeout_s: float = Field(default=3600.0, gt=0, description="Longest time without a message on a connection.")
    frame_timeout_s: float = Field(default=60.0, gt=0, description="Longest time from the start of a frame to its end.")
    write_timeout_s: float = Field(default=10.0, gt=0, description="Longest wait for a sender to take its answer.")
    tls_handshake_timeout_s: float = Field(default=10.0, gt=0, description="Longest TLS handshake.")
    stop_timeout_s: float = Field(default=10.0, gt=0, description="When stopping: longest wait for messages in hand.")

    @model_validator(mode="after")
    def _tls_whole(self) -> Self:
        needless = [name for name in _TLS_ONLY if getattr(self, name)]
        if not self.tls and needless:
            raise ValueError(f"{', '.join(needless)} need tls: true")
        if self.tls and not self.cert_file:
            raise ValueError("tls: true needs cert_file")
        return self

    @model_validator(mode="after")
    def _client_certificates_whole(self) -> Self:
        asked_for = "require_client_cert" in self.model_fields_set and self.require_client_cert
        if asked_for and not self.ca_file:
            raise ValueError("require_client_cert needs ca_file (and tls: true)")
        if self.allowed_subjects and not (self.ca_file and self.require_client_cert):
            raise ValueError("allowed_subjects needs ca_file, and require_client_cert: true")
        return self

    @model_validator(mode="after")
    def _a_message_fits(self) -> Self:
        if self.max_buffered_bytes < self.max_message_bytes:
            raise ValueError("max_buffered_bytes must not be less than max_message_bytes")
        return self
