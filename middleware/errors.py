"""How a reading ends early, named by what a person must do about it."""

from typing import Literal

EndState = Literal["unmatched", "unusable", "held", "quarantined", "failed"]


class Stopped(Exception):
    """The reading stops here and nothing more is done with it.

    `state`: unmatched (no protocol applies), unusable (the images cannot be read safely), held (identities
    disagree; a person decides), quarantined (a rendering failed its checks), failed (a system did not do its
    part in time). `reasons` are sentences for people, without names or birth dates.
    """

    def __init__(self, state: EndState, reasons: tuple[str, ...]) -> None:
        super().__init__("; ".join(reasons))
        self.state = state
        self.reasons = reasons


class SettingsError(Exception):
    """Settings or a protocol file cannot be used; the message names the file, the place and what is wrong."""
