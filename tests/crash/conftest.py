"""The small study and a model that knows its truth, shared by the tests that kill the service."""

from collections.abc import Iterator

import pytest

from deploy.triton.bundled import BundledTriton
from tests.crash.small_study import SmallStudy, build_small_truth


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> SmallStudy:
    return SmallStudy(tmp_path_factory.mktemp("phantom"))


@pytest.fixture(scope="session")
def small_triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with BundledTriton(build_small_truth(tmp_path_factory.mktemp("models"))) as server:
        yield server.grpc_url
