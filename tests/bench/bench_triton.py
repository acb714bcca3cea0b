"""Our Triton client beside stock tritonclient on a 64 MiB tensor there and back; a script, and part of `make bench`."""

import asyncio
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient.grpc import InferInput  # type: ignore[import-untyped]
from tritonclient.grpc.aio import InferenceServerClient  # type: ignore[import-untyped]

sys.path.insert(0, str(Path(__file__).parents[2]))

from connectors.triton.client import TensorSpec, TritonClient
from connectors.triton.config import TritonConfig
from deploy.triton.bundled import BundledTriton

BUDGET = 1.25
SHAPE = (16, 1024, 1024)  # FP32: 64 MiB
ROUNDS = 9
BRIDGE = Path(__file__).parents[2] / "deploy" / "triton" / "models" / "prostate_reference" / "1" / "numpy_bridge.py"

CONFIG = """
name: "identity"
backend: "python"
max_batch_size: 0
input [ { name: "x" data_type: TYPE_FP32 dims: [ -1, -1, -1 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ -1, -1, -1 ] } ]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""

MODEL = """
import numpy_bridge
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        array = numpy_bridge.np.array(numpy_bridge.to_numpy(request, "x"))
        return pb_utils.InferenceResponse(output_tensors=[numpy_bridge.to_tensor("y", array)])
"""


def bench_client() -> dict[str, Any]:
    """Median seconds of ours and of the rival, taken in turns against one server; the median ratio of the pairs."""
    with tempfile.TemporaryDirectory() as folder, BundledTriton(_identity(Path(folder))) as server:
        pairs = asyncio.run(_measure(server.grpc_url))
    ratio = statistics.median(ours / rival for ours, rival in pairs)
    return {
        "name": "triton client, 64 MiB there and back",
        "ours": round(statistics.median(ours for ours, _ in pairs), 4),
        "rival": round(statistics.median(rival for _, rival in pairs), 4),
        "rival_name": "tritonclient.grpc.aio",
        "unit": "s",
        "ratio": round(ratio, 3),
        "budget": BUDGET,
        "within": ratio <= BUDGET,
    }


def _identity(repository: Path) -> Path:
    version = repository / "identity" / "1"
    version.mkdir(parents=True)
    (repository / "identity" / "config.pbtxt").write_text(CONFIG)
    (version / "model.py").write_text(MODEL)
    shutil.copy(BRIDGE, version)
    return repository


async def _measure(url: str) -> list[tuple[float, float]]:
    array = np.random.default_rng(0).random(SHAPE, np.float32)
    stock = InferenceServerClient(url)
    async with TritonClient(TritonConfig(url=url)) as client:
        spec = TensorSpec("y", "FP32", SHAPE)

        async def ours() -> Any:
            return (await client.infer("identity", "1", {"x": array}, [spec])).outputs["y"]

        async def rival() -> Any:
            tensor = InferInput("x", list(SHAPE), "FP32")
            tensor.set_data_from_numpy(array)
            return (await stock.infer("identity", [tensor], model_version="1")).as_numpy("y")

        for call in (ours, rival):  # warm: connections, shared memory, page tables
            assert np.array_equal(await call(), array)
        # Each round swaps who goes first, so that what one call leaves behind burdens both alike.
        pairs = [await _pair(ours, rival, swap=bool(turn % 2)) for turn in range(ROUNDS)]
    await stock.close()
    return pairs


async def _pair(
    ours: Callable[[], Awaitable[Any]], rival: Callable[[], Awaitable[Any]], *, swap: bool
) -> tuple[float, float]:
    if swap:
        rival_s, ours_s = await _timed(rival), await _timed(ours)
    else:
        ours_s, rival_s = await _timed(ours), await _timed(rival)
    return ours_s, rival_s


async def _timed(call: Callable[[], Awaitable[Any]]) -> float:
    started = time.perf_counter()
    await call()
    return time.perf_counter() - started


if __name__ == "__main__":
    result = bench_client()
    print(json.dumps(result))
    sys.exit(0 if result["within"] else 1)
