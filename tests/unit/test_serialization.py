"""Step outputs in the workflow store: JSON, small, and an early end that keeps its reasons."""

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from middleware.errors import EndState, Stopped
from middleware.serialization import MAX_STEP_OUTPUT_BYTES, JsonSerializer, RecordedError

SERIALIZER = JsonSerializer()
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def there_and_back(value: Any) -> Any:
    return SERIALIZER.deserialize(SERIALIZER.serialize(value))


@given(JSON_VALUES)
def test_json_values_come_back(value: Any) -> None:
    if not (isinstance(value, dict) and "!error" in value):
        assert there_and_back(value) == value


@pytest.mark.parametrize("state", get_args(EndState))
def test_stopped_comes_back_with_state_and_reasons(state: EndState) -> None:
    found = there_and_back(Stopped(state, ("first: é", "second")))
    assert isinstance(found, Stopped)
    assert (found.state, found.reasons, str(found)) == (state, ("first: é", "second"), "first: é; second")


def test_stopped_inside_a_value_comes_back_too() -> None:
    found = there_and_back({"results": [1, Stopped("held", ("why",))]})
    assert found["results"][1].reasons == ("why",)


def test_other_errors_keep_their_type_and_message() -> None:
    found = there_and_back(KeyError("missing"))
    assert isinstance(found, RecordedError)
    assert str(found) == "KeyError: 'missing'"


def test_size_is_counted_in_bytes_up_to_the_limit() -> None:
    assert len(SERIALIZER.serialize("x" * (MAX_STEP_OUTPUT_BYTES - 2))) == MAX_STEP_OUTPUT_BYTES
    with pytest.raises(ValueError, match=r"262145 bytes is over 262144; store it by digest"):
        SERIALIZER.serialize("x" * (MAX_STEP_OUTPUT_BYTES - 1))
    with pytest.raises(ValueError, match="over 262144"):
        SERIALIZER.serialize("é" * (MAX_STEP_OUTPUT_BYTES // 2))


@pytest.mark.parametrize("value", [b"pixels", {1, 2}, object(), 1j])
def test_what_json_cannot_hold_is_refused_by_type(value: object) -> None:
    with pytest.raises(TypeError, match=f"a step gave a {type(value).__name__}, which JSON cannot hold"):
        SERIALIZER.serialize({"inside": [value]})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_does_not_have_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        SERIALIZER.serialize({"score": value})


def test_format_has_a_name_of_its_own() -> None:
    assert SERIALIZER.name() == "wetread_json"
