"""The small study, under the name that the tests that kill the service know it by."""

import pytest

from tests.crash.small_study import SmallStudy


@pytest.fixture(scope="session")
def study(small_study: SmallStudy) -> SmallStudy:
    return small_study
