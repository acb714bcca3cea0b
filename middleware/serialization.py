"""How step outputs are kept in the workflow store: JSON only, small, readable by any version."""

import json
from typing import Any, cast

from dbos import Serializer

from middleware.errors import EndState, Stopped

MAX_STEP_OUTPUT_BYTES = 256 * 1024
"""Larger outputs are refused: pixels and documents belong in the artifact store."""


class RecordedError(Exception):
    """An error of an earlier run, as far as JSON keeps it: its type's name and message."""


class JsonSerializer(Serializer):
    """JSON for values, and for errors their type, message and (for `Stopped`) state and reasons."""

    def name(self) -> str:
        """The format's name in the workflow store."""
        return "wetread_json"

    def serialize(self, data: Any) -> str:
        """JSON text; ValueError over `MAX_STEP_OUTPUT_BYTES` or for NaN, TypeError for what JSON cannot hold."""
        text = json.dumps(data, default=_encode_error, separators=(",", ":"), allow_nan=False)
        if len(text) > MAX_STEP_OUTPUT_BYTES:
            raise ValueError(
                f"a step's output of {len(text)} bytes is over {MAX_STEP_OUTPUT_BYTES}; store it by digest"
            )
        return text

    def deserialize(self, serialized_data: str) -> Any:
        """The value or error again."""
        return json.loads(serialized_data, object_hook=_decode_error)


def _encode_error(value: Any) -> Any:
    if isinstance(value, Stopped):
        return {"!error": "Stopped", "state": value.state, "reasons": list(value.reasons)}
    if isinstance(value, BaseException):
        return {"!error": type(value).__name__, "message": str(value)}
    raise TypeError(f"a step gave a {type(value).__name__}, which JSON cannot hold")


def _decode_error(value: dict[str, Any]) -> Any:
    if value.get("!error") == "Stopped":
        return Stopped(cast(EndState, value["state"]), tuple(value["reasons"]))
    if "!error" in value:
        return RecordedError(f"{value['!error']}: {value['message']}")
    return value
