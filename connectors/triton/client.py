"""Asks models on a Triton Inference Server (KServe v2 over gRPC), and believes no answer unchecked.

An inference has no side effect, so whatever is not certain is `Retryable`; `Ambiguous` does not occur.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np
from tritonclient.grpc import InferInput, InferRequestedOutput, InferResult  # type: ignore[import-untyped]
from tritonclient.grpc.aio import InferenceServerClient  # type: ignore[import-untyped]
from tritonclient.utils import (  # type: ignore[import-untyped]
    InferenceServerException,
    np_to_triton_dtype,
    triton_to_np_dtype,
)

from connectors.errors import ConnectorError, Permanent, Retryable
from connectors.triton.config import TritonConfig

Array = np.ndarray[Any, np.dtype[Any]]
Answer = TypeVar("Answer")

ANY = -1
_KEEPALIVE_TIME_MS = 60_000
_RECONNECT_MS = 200
_MAX_RECONNECT_MS = 5_000

# gRPC status codes after which the same request must fail again; every other failure may pass.
# INTERNAL is not among them: Triton uses it for a model's own exception, but also for a crashed
# stub process that it restarts, and for memory that is short just now.
_PERMANENT_STATUS = frozenset(
    {
        "INVALID_ARGUMENT",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "UNAUTHENTICATED",
        "FAILED_PRECONDITION",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
        "DATA_LOSS",
    }
)


@dataclass(frozen=True)
class TensorSpec:
    """What one tensor must be: KServe datatype (`FP32`, `UINT8` ...) and shape, where -1 is any size.

    `allow_nan` lets NaN pass in an answer; infinity never passes.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    allow_nan: bool = False

    def __str__(self) -> str:
        return f"{self.datatype} {_dimensions(self.shape)}"


@dataclass(frozen=True)
class Inference:
    """A checked answer. The arrays are read-only views of the received bytes."""

    outputs: dict[str, Array]
    model_name: str
    model_version: str
    duration_s: float


class TritonClient:
    """One server. Use within one event loop at a time; the connection opens on the first call.

    Raises `Retryable` (down, not ready, overloaded, too slow, failed inside) and `Permanent` (no such model,
    wrong tensors either way, an answer that cannot be trusted).
    """

    def __init__(self, config: TritonConfig) -> None:
        self._config = config
        self._rpc: InferenceServerClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._metadata: dict[tuple[str, str], Any] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the connection; running calls end. A later call opens a new one."""
        rpc, self._rpc = self._rpc, None
        if rpc is not None and self._loop is asyncio.get_running_loop():
            await rpc.close()

    async def ready(self) -> bool:
        """Whether the server answers and is ready for inference; False also when it cannot be reached."""
        try:
            return bool(await self._control("readiness", self._client().is_server_ready(**self._control_timeout())))
        except Retryable:
            return False

    async def probe(self) -> str:
        """Says in one line what answers there: server, version and the models that are ready."""
        rpc, timeout = self._client(), self._control_timeout()
        server = await self._control("metadata", rpc.get_server_metadata(**timeout))
        if not await self.ready():
            raise Retryable(f"{self._where}: the server answers but is not ready; see its log for the model that fails")
        index = await self._control("repository index", rpc.get_model_repository_index(**timeout))
        models = sorted(f"{model.name} v{model.version}" for model in index.models if model.state == "READY")
        return f"{server.name} {server.version} at {self._config.url}, ready: {', '.join(models) or 'no model'}"

    async def check_model(
        self, name: str, version: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
    ) -> None:
        """Passes when the model is ready and its tensors are those expected; otherwise names each difference.

        An input may be more general at the server (-1) than expected, an output more special.
        Raises `Retryable` when the server or model is not ready, `Permanent` for the differences.
        """
        metadata = await self._load_metadata(name, version)
        model = self._model(name, version)
        rpc = self._client()
        if not await self._control("model readiness", rpc.is_model_ready(name, version, **self._control_timeout())):
            raise Retryable(f"{model} is not ready; it may still be loading, see the server's log")
        problems = _input_problems(metadata.inputs, inputs) + _output_problems(metadata.outputs, outputs)
        if problems:
            raise Permanent(f"{model} does not fit: {'; '.join(problems)}")

    async def infer(
        self,
        name: str,
        version: str,
        inputs: Mapping[str, Array],
        outputs: Sequence[TensorSpec],
        *,
        deadline_s: float | None = None,
        priority: int | None = None,
        request_id: str = "",
    ) -> Inference:
        """Sends the arrays to the pinned version and returns exactly the asked outputs, checked.

        The arrays' names, datatypes and shapes are checked against the model's metadata before anything is
        sent. Of the answer: model and version, names, datatypes, shapes, and values (NaN, infinity).
        """
        limit_s = self._config.deadline_s if deadline_s is None else deadline_s
        level = self._config.priority if priority is None else priority
        started = time.monotonic()
        try:
            result = await self._ask(name, version, inputs, outputs, limit_s, level, request_id)
        except ConnectorError:
            # The model may have been replaced under the same version; the next try looks again.
            self._metadata.pop((name, version), None)
            raise
        model = self._model(name, version)
        _check_identity(model, result, name, version)
        arrays = {spec.name: _checked(model, result, spec) for spec in outputs}
        return Inference(arrays, name, version, time.monotonic() - started)

    async def _ask(
        self,
        name: str,
        version: str,
        inputs: Mapping[str, Array],
        outputs: Sequence[TensorSpec],
        limit_s: float,
        priority: int,
        request_id: str,
    ) -> InferResult:
        metadata = self._metadata.get((name, version)) or await self._load_metadata(name, version)
        model = self._model(name, version)
        call = self._client().infer(
            name,
            _to_tensors(model, inputs, metadata),
            model_version=version,
            outputs=[InferRequestedOutput(spec.name) for spec in outputs],
            request_id=request_id,
            priority=priority,
            client_timeout=limit_s,
        )
        try:
            return await call
        except InferenceServerException as error:
            raise _classified(model, error, limit_s) from error

    def _model(self, name: str, version: str) -> str:
        return f"{self._where}: model {name} version {version}"

    @property
    def _where(self) -> str:
        return f"{self._config.name} at {self._config.url}"

    def _client(self) -> InferenceServerClient:
        loop = asyncio.get_running_loop()
        if self._rpc is None or self._loop is not loop:
            self._rpc, self._loop = _connect(self._config), loop
        return self._rpc

    def _control_timeout(self) -> dict[str, float]:
        return {"client_timeout": self._config.control_timeout_s}

    async def _control(self, what: str, call: Awaitable[Answer]) -> Answer:
        try:
            return await call
        except InferenceServerException as error:
            raise _classified(f"{self._where}: {what}", error, self._config.control_timeout_s) from error

    async def _load_metadata(self, name: str, version: str) -> Any:
        call = self._client().get_model_metadata(name, version, **self._control_timeout())
        metadata = await self._control(f"metadata of model {name} version {version}", call)
        self._metadata[name, version] = metadata
        return metadata


def _connect(config: TritonConfig) -> InferenceServerClient:
    """Opens nothing yet; gRPC connects on the first call."""
    options: list[tuple[str, int | str]] = [
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.keepalive_time_ms", _KEEPALIVE_TIME_MS),
        # How long one attempt to connect may take; then how soon a restarted server is noticed.
        ("grpc.min_reconnect_backoff_ms", round(config.connect_timeout_s * 1000)),
        ("grpc.initial_reconnect_backoff_ms", _RECONNECT_MS),
        ("grpc.max_reconnect_backoff_ms", max(_MAX_RECONNECT_MS, round(config.connect_timeout_s * 1000))),
        # Images go to the server named in the settings, never to a proxy that a variable names.
        ("grpc.enable_http_proxy", 0),
        # Channels with equal options share one connection and its backoff; each client keeps its own.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    tls = config.tls
    if tls is None:
        return InferenceServerClient(config.url, channel_args=options)
    if tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    files = (tls.ca_file, tls.client_key_file, tls.client_cert_file)
    ca, key, chain = (str(path) if path else None for path in files)
    return InferenceServerClient(
        config.url, ssl=True, root_certificates=ca, private_key=key, certificate_chain=chain, channel_args=options
    )


def _classified(what: str, error: InferenceServerException, limit_s: float) -> ConnectorError:
    """The error by its consequence, from the gRPC status."""
    status = (error.status() or "UNKNOWN").removeprefix("StatusCode.")
    detail = " ".join((error.message() or "").split()) or "no detail given"
    if status == "DEADLINE_EXCEEDED":
        return Retryable(f"{what} gave no answer within {limit_s:g} s; look at the server's load or raise deadline_s")
    if status == "UNAVAILABLE":
        return Retryable(f"{what} is not available: {detail}")
    if status == "RESOURCE_EXHAUSTED" and "larger than max" in detail:
        return Permanent(f"{what}: message too large, see max_message_bytes here and at the server: {detail}")
    if status in _PERMANENT_STATUS:
        return Permanent(f"{what} refused ({status}): {detail}")
    return Retryable(f"{what} failed ({status}): {detail}")


def _input_problems(served: Sequence[Any], expected: Sequence[TensorSpec]) -> list[str]:
    problems = _differences("input", served, expected, lambda ours, theirs: theirs in (ours, ANY))
    known = {spec.name for spec in expected}
    return problems + [f"the model also needs input {each.name}" for each in served if each.name not in known]


def _output_problems(served: Sequence[Any], expected: Sequence[TensorSpec]) -> list[str]:
    return _differences("output", served, expected, lambda ours, theirs: ANY in (ours, theirs) or ours == theirs)


def _differences(kind: str, served: Sequence[Any], expected: Sequence[TensorSpec], fits: Any) -> list[str]:
    offered = {each.name: each for each in served}
    problems = []
    for spec in expected:
        tensor = offered.get(spec.name)
        if tensor is None:
            problems.append(f"{kind} {spec.name} is missing (the model has {', '.join(offered) or 'none'})")
            continue
        shape = tuple(tensor.shape)
        same_rank = len(shape) == len(spec.shape)
        if tensor.datatype != spec.datatype:
            problems.append(f"{kind} {spec.name} is {tensor.datatype}, expected {spec.datatype}")
        if not same_rank or not all(map(fits, spec.shape, shape)):
            problems.append(f"{kind} {spec.name} has shape {_dimensions(shape)}, expected {_dimensions(spec.shape)}")
    return problems


def _to_tensors(model: str, arrays: Mapping[str, Array], metadata: Any) -> list[InferInput]:
    """The arrays as request tensors; `Permanent` before anything is sent where one does not fit the model."""
    offered = [TensorSpec(name, _datatype(array), array.shape) for name, array in arrays.items()]
    if problems := _input_problems(metadata.inputs, offered):
        raise Permanent(f"{model}: the request does not fit, nothing was sent: {'; '.join(problems)}")
    tensors = []
    for spec in offered:
        tensor = InferInput(spec.name, list(spec.shape), spec.datatype)
        tensor.set_data_from_numpy(np.ascontiguousarray(arrays[spec.name]))
        tensors.append(tensor)
    return tensors


def _datatype(array: Array) -> str:
    """The KServe name of the array's dtype; big-endian numbers have none, the wire is little-endian."""
    if not array.dtype.isnative:
        return f"byte-swapped {array.dtype}"
    return np_to_triton_dtype(array.dtype.type) or f"unknown ({array.dtype})"


def _check_identity(model: str, result: InferResult, name: str, version: str) -> None:
    response = result.get_response()
    if (response.model_name, response.model_version) != (name, version):
        answered = f"{response.model_name} version {response.model_version}"
        raise Permanent(f"{model} was asked, {answered} answered; pin the version at the server")


def _checked(model: str, result: InferResult, spec: TensorSpec) -> Array:
    """The output as an array, or `Permanent` saying which tensor breaks which expectation."""
    where = f"{model}: output {spec.name}"
    tensor = result.get_output(spec.name)
    if tensor is None:
        raise Permanent(f"{where} is missing from the answer")
    shape = tuple(tensor.shape)
    if tensor.datatype != spec.datatype:
        raise Permanent(f"{where} is {tensor.datatype}, expected {spec.datatype}")
    if len(shape) != len(spec.shape) or any(o not in (ANY, t) for o, t in zip(spec.shape, shape, strict=True)):
        raise Permanent(f"{where} has shape {_dimensions(shape)}, expected {_dimensions(spec.shape)}")
    array = _array(where, result, spec, shape)
    if array.dtype.kind == "f":
        _check_values(where, array, spec.allow_nan)
    return array


def _array(where: str, result: InferResult, spec: TensorSpec, shape: tuple[int, ...]) -> Array:
    try:
        array = result.as_numpy(spec.name)
    except (ValueError, TypeError) as error:
        dtype = triton_to_np_dtype(spec.datatype)
        wanted = math.prod(shape) * np.dtype(dtype).itemsize if dtype else "an unknown number of"
        raise Permanent(f"{where} does not hold the {wanted} bytes of its shape {_dimensions(shape)}") from error
    return np.asarray(array)


def _check_values(where: str, array: Array, allow_nan: bool) -> None:
    # Minimum and maximum carry NaN and infinity along, without the mask that isfinite() would build.
    if array.size == 0 or (math.isfinite(array.min()) and math.isfinite(array.max())):
        return
    infinite, missing = int(np.isinf(array).sum()), int(np.isnan(array).sum())
    if infinite:
        raise Permanent(f"{where} holds {infinite} infinite of {array.size} values")
    if not allow_nan:
        raise Permanent(f"{where} holds {missing} NaN of {array.size} values; NaN is not allowed there")


def _dimensions(shape: Sequence[int]) -> str:
    return "[" + ",".join("any" if size == ANY else str(size) for size in shape) + "]"
