"""The Triton connector, the reference model and the bundled launcher against the real tritonserver."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from connectors.errors import Permanent, Retryable
from connectors.triton.client import TensorSpec, TritonClient
from connectors.triton.config import TritonConfig, TritonTls
from deploy.triton.bundled import BundledTriton, BundledTritonError, bundled_triton_available, free_ports
from tests.fixtures.triton_truth import MODELS, build_truth_repository
from tests.fixtures.triton_truth.study import RealStudy, real_study

ROOT = Path(__file__).parents[2]
REFERENCE = "prostate_reference"
VOLUME = (-1, -1, -1)
INPUTS = (
    TensorSpec("t2w", "FP32", VOLUME),
    TensorSpec("adc", "FP32", VOLUME),
    TensorSpec("hbv", "FP32", VOLUME),
    TensorSpec("spacing", "FP32", (3,)),
)
SMALL = (6, 8, 10)


def _outputs(shape: tuple[int, ...] = VOLUME) -> tuple[TensorSpec, ...]:
    masks = (TensorSpec(name, "UINT8", shape) for name in ("gland", "zones", "lesions"))
    return (*masks, TensorSpec("scores", "FP32", (-1, 4), allow_nan=True))


def _small_masks() -> tuple[Any, Any, Any]:
    gland = np.zeros(SMALL, np.uint8)
    gland[2:5, 2:6, 3:8] = 1
    lesion = np.zeros(SMALL, np.uint8)
    lesion[3, 4, 4] = 1
    return gland, gland * 2, lesion


def _small_inputs() -> dict[str, Any]:
    volumes = {name: np.ones(SMALL, np.float32) for name in ("t2w", "adc", "hbv")}
    return {**volumes, "spacing": np.array([3, 0.5, 0.5], np.float32)}


@pytest.fixture(scope="module")
def study() -> RealStudy:
    return real_study()


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory, study: RealStudy) -> Iterator[BundledTriton]:
    """One server: the reference model, the truth of the real study, and small models with one fault each."""
    faulty = tmp_path_factory.mktemp("models")
    build_truth_repository(faulty, study.gland, study.zones, study.lesion, name="truth")
    for fault in ("wrong_shape", "wrong_dtype", "nan_confidence", "infinite", "raising", "empty"):
        build_truth_repository(faulty, *_small_masks(), fault=fault, name=fault)
    build_truth_repository(faulty, *_small_masks(), fault="slow", sleep_s=0.6, name="slow")
    build_truth_repository(faulty, *_small_masks(), name="second", version=2)
    with BundledTriton(MODELS, faulty) as server:
        yield server


@pytest.fixture
async def client(triton: BundledTriton) -> AsyncIterator[TritonClient]:
    async with TritonClient(TritonConfig(url=triton.grpc_url)) as client:
        yield client


async def _ask_small(client: TritonClient, model: str, version: str = "1", **options: Any) -> Any:
    return await client.infer(model, version, _small_inputs(), _outputs(SMALL), **options)


# The models -----------------------------------------------------------------------------------------------------


async def test_reference_model_finds_the_real_gland_and_lesion(client: TritonClient, study: RealStudy) -> None:
    answer = await client.infer(REFERENCE, "1", study.inputs, _outputs(study.gland.shape))
    gland = answer.outputs["gland"] > 0
    dice = 2 * (gland & (study.gland > 0)).sum() / (gland.sum() + (study.gland > 0).sum())
    assert dice > 0.84
    assert ((answer.outputs["lesions"] > 0) & (study.lesion > 0)).any()
    assert answer.outputs["scores"].shape == (answer.outputs["lesions"].max(), 4)
    assert (answer.model_name, answer.model_version) == (REFERENCE, "1")
    assert 0 < answer.duration_s < 30


async def test_truth_model_gives_the_masks_back_voxel_for_voxel(client: TritonClient, study: RealStudy) -> None:
    answer = await client.infer("truth", "1", study.inputs, _outputs(study.gland.shape))
    assert np.array_equal(answer.outputs["gland"], study.gland)
    assert np.array_equal(answer.outputs["zones"], study.zones)
    assert np.array_equal(answer.outputs["lesions"], study.lesion > 0)
    assert np.array_equal(answer.outputs["scores"], np.array([[4, 4, np.nan, 0.9]], np.float32), equal_nan=True)


async def test_no_lesion_is_an_answer_of_size_zero(client: TritonClient) -> None:
    answer = await _ask_small(client, "empty")
    assert answer.outputs["scores"].shape == (0, 4)
    assert not answer.outputs["lesions"].any()


async def test_noise_gives_an_empty_answer_from_the_reference(client: TritonClient, study: RealStudy) -> None:
    random = np.random.default_rng(0)
    noise = {name: random.normal(100, 30, (12, 96, 96)).astype(np.float32) for name in ("t2w", "adc", "hbv")}
    inputs = {**noise, "spacing": np.array([3, 1, 1], np.float32)}
    answer = await client.infer(REFERENCE, "1", inputs, _outputs((12, 96, 96)))
    assert answer.outputs["scores"].shape == (0, 4)
    assert not answer.outputs["gland"].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t2w": np.zeros(SMALL, np.float32)}, "t2w covers"),
        ({"adc": np.ones((5, 8, 10), np.float32)}, r"adc has shape \(5, 8, 10\), t2w has \(6, 8, 10\)"),
        ({"spacing": np.array([3, -1, 1], np.float32)}, "spacing must be three positive mm values"),
    ],
)
async def test_reference_model_refuses_by_name(client: TritonClient, change: dict[str, Any], message: str) -> None:
    with pytest.raises(Permanent, match=message):
        await client.infer(REFERENCE, "1", {**_small_inputs(), **change}, _outputs())


# Readiness and metadata -----------------------------------------------------------------------------------------


async def test_probe_names_server_and_models(client: TritonClient) -> None:
    assert await client.ready()
    line = await client.probe()
    assert "2.51" in line
    assert "prostate_reference v1" in line
    assert "second v2" in line


async def test_fitting_model_passes_the_check(client: TritonClient) -> None:
    await client.check_model(REFERENCE, "1", INPUTS, _outputs())
    await client.check_model(REFERENCE, "1", [replace(INPUTS[0], shape=(19, 384, 384)), *INPUTS[1:]], _outputs())


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ((replace(INPUTS[0], datatype="FP16"), *INPUTS[1:]), _outputs(), "input t2w is FP32, expected FP16"),
        (INPUTS[:3], _outputs(), "the model also needs input spacing"),
        ((*INPUTS, TensorSpec("dce", "FP32", VOLUME)), _outputs(), "input dce is missing"),
        ((*INPUTS[:3], TensorSpec("spacing", "FP32", (-1,))), _outputs(), r"spacing has shape \[3\], expected \[any\]"),
        (INPUTS, (TensorSpec("gland", "UINT8", (-1, -1)),), r"output gland has shape \[any,any,any\]"),
        (INPUTS, (TensorSpec("scores", "FP32", (-1, 5)),), r"scores has shape \[any,4\], expected \[any,5\]"),
        (INPUTS, (TensorSpec("capsule", "UINT8", VOLUME),), r"output capsule is missing \(the model has gland"),
    ],
)
async def test_check_names_what_differs(client: TritonClient, inputs: Any, outputs: Any, message: str) -> None:
    with pytest.raises(Permanent, match=message):
        await client.check_model(REFERENCE, "1", inputs, outputs)


async def test_all_differences_are_named_at_once(client: TritonClient) -> None:
    with pytest.raises(Permanent, match=r"input t2w .*; .*output capsule"):
        await client.check_model(
            REFERENCE, "1", [replace(INPUTS[0], datatype="INT16"), *INPUTS[1:]], [TensorSpec("capsule", "UINT8", (1,))]
        )


@pytest.mark.parametrize(("model", "version"), [("no_such_model", "1"), (REFERENCE, "9")])
async def test_unknown_model_or_version_is_permanent(client: TritonClient, model: str, version: str) -> None:
    with pytest.raises(Permanent, match=f"{model} version {version}"):
        await client.check_model(model, version, INPUTS, _outputs())
    with pytest.raises(Permanent, match=f"{model} version {version}"):
        await _ask_small(client, model, version)


async def test_pinned_version_answers(client: TritonClient) -> None:
    assert (await _ask_small(client, "second", "2")).model_version == "2"
    with pytest.raises(Permanent, match="second version 1"):
        await _ask_small(client, "second", "1")


async def test_unpinned_version_is_refused(client: TritonClient) -> None:
    with pytest.raises(Permanent, match="second version 2 answered"):
        await _ask_small(client, "second", "")


# Answers that cannot be trusted ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("wrong_shape", r"output zones has shape \[5,8,10\], expected \[6,8,10\]"),
        ("wrong_dtype", "output gland is FP32, expected UINT8"),
        ("infinite", "output scores holds 4 infinite of 4 values"),
    ],
)
async def test_wrong_answer_is_refused(client: TritonClient, model: str, message: str) -> None:
    with pytest.raises(Permanent, match=message):
        await _ask_small(client, model)


async def test_nan_is_refused_where_the_tensor_does_not_allow_it(client: TritonClient) -> None:
    strict = (*_outputs(SMALL)[:3], TensorSpec("scores", "FP32", (-1, 4)))
    with pytest.raises(Permanent, match="output scores holds 2 NaN of 4 values"):
        await client.infer("nan_confidence", "1", _small_inputs(), strict)
    assert (await _ask_small(client, "nan_confidence")).outputs["scores"].shape == (1, 4)


async def test_output_the_model_does_not_have_is_permanent(client: TritonClient) -> None:
    with pytest.raises(Permanent, match="capsule"):
        await client.infer("empty", "1", _small_inputs(), [TensorSpec("capsule", "UINT8", VOLUME)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t2w": np.ones(SMALL, np.float64)}, "input t2w is FP32, expected FP64"),
        ({"adc": np.ones(SMALL, ">f4")}, "input adc is FP32, expected byte-swapped >f4"),
        ({"hbv": np.ones((8, 10), np.float32)}, r"input hbv has shape \[any,any,any\], expected \[8,10\]"),
        ({"spacing": np.ones(2, np.float32)}, r"input spacing has shape \[3\], expected \[2\]"),
        ({"dce": np.ones(SMALL, np.float32)}, "input dce is missing"),
    ],
)
async def test_unfit_request_is_refused_before_it_is_sent(
    client: TritonClient, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(Permanent, match=f"nothing was sent: .*{message}"):
        await client.infer(REFERENCE, "1", {**_small_inputs(), **change}, _outputs())


async def test_non_contiguous_input_arrives_as_it_looks(client: TritonClient, study: RealStudy) -> None:
    turned = {name: np.asfortranarray(array) for name, array in study.inputs.items()}
    straight = await client.infer(REFERENCE, "1", study.inputs, _outputs())
    other = await client.infer(REFERENCE, "1", turned, _outputs())
    assert np.array_equal(straight.outputs["gland"], other.outputs["gland"])


# Down, slow, failing --------------------------------------------------------------------------------------------


async def test_server_down_is_retryable() -> None:
    async with TritonClient(TritonConfig(url=f"127.0.0.1:{free_ports(1)[0]}")) as client:
        assert not await client.ready()
        for call in (client.probe(), client.check_model("m", "1", (), ()), _ask_small(client, "m")):
            with pytest.raises(Retryable, match="is not available"):
                await call


async def test_server_that_accepts_and_says_nothing_is_retryable_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = TritonConfig(url=f"127.0.0.1:{silent.getsockname()[1]}", control_timeout_s=0.5, deadline_s=0.5)
        async with TritonClient(config) as client:
            started = time.monotonic()
            with pytest.raises(Retryable, match=r"no answer within 0.5 s|not available"):
                await client.check_model("m", "1", (), ())
            assert not await client.ready()
            assert time.monotonic() - started < 5


async def test_deadline_ends_a_slow_model(client: TritonClient) -> None:
    started = time.monotonic()
    with pytest.raises(Retryable, match=r"slow version 1 gave no answer within 0\.2 s"):
        await _ask_small(client, "slow", deadline_s=0.2)
    assert time.monotonic() - started < 0.6
    assert (await _ask_small(client, "slow", deadline_s=20)).outputs["gland"].any()


async def test_exception_in_the_model_is_retryable_and_quoted(client: TritonClient) -> None:
    with pytest.raises(Retryable, match=r"raising version 1 failed .*the model fails on purpose"):
        await _ask_small(client, "raising")
    with pytest.raises(Retryable, match="the model fails on purpose"):
        await _ask_small(client, "raising")


async def test_cancelled_call_leaves_the_client_usable(client: TritonClient) -> None:
    call = asyncio.create_task(_ask_small(client, "slow"))
    await asyncio.sleep(0.1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert (await _ask_small(client, "empty")).outputs["scores"].shape == (0, 4)


async def test_urgent_request_overtakes_a_routine_one(client: TritonClient) -> None:
    order: list[str] = []

    async def ask(label: str, priority: int) -> None:
        await _ask_small(client, "slow", priority=priority, request_id=label)
        order.append(label)

    await _ask_small(client, "slow")  # the instance is free again after the tests that gave up on it
    calls = []
    for label, priority in (("running", 0), ("routine", 2), ("urgent", 1)):
        calls.append(asyncio.create_task(ask(label, priority)))
        await asyncio.sleep(0.1)
    await asyncio.gather(*calls)
    assert order == ["running", "urgent", "routine"]


async def test_message_over_the_limit_is_permanent(triton: BundledTriton) -> None:
    async with TritonClient(TritonConfig(url=triton.grpc_url, max_message_bytes=4096)) as client:
        with pytest.raises(Permanent, match="max_message_bytes"):
            await _ask_small(client, "empty")


async def test_parallel_requests_do_not_mix(client: TritonClient) -> None:
    names = ("empty", "second", "nan_confidence", "empty", "second")
    answers = await asyncio.gather(*(_ask_small(client, n, "2" if n == "second" else "1") for n in names))
    assert [answer.model_name for answer in answers] == list(names)
    assert [len(answer.outputs["scores"]) for answer in answers] == [0, 1, 1, 0, 1]


async def test_closed_client_opens_again(client: TritonClient) -> None:
    assert await client.ready()
    await client.aclose()
    assert await client.ready()


def test_client_survives_a_new_event_loop(triton: BundledTriton) -> None:
    client = TritonClient(TritonConfig(url=triton.grpc_url))
    for _ in range(2):
        assert asyncio.run(client.ready())


# TLS ------------------------------------------------------------------------------------------------------------


def _certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for triton.test, by the system's openssl."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=triton.test"),
            *("-addext", "subjectAltName=DNS:triton.test", "-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


async def test_mutual_tls(tmp_path: Path) -> None:
    models = build_truth_repository(tmp_path / "models", *_small_masks(), name="small")
    certificate, key = _certificate(tmp_path)
    options = {"grpc-use-ssl-mutual": "true", "grpc-server-cert": certificate, "grpc-server-key": key}
    arguments = [f"--{name}={value}" for name, value in {**options, "grpc-root-cert": certificate}.items()]
    ours = {"client_cert_file": certificate, "client_key_file": key, "server_name": "triton.test"}
    async with BundledTriton(models, arguments=arguments) as server:
        for tls, works in (
            ({"ca_file": certificate, **ours}, True),
            ({"ca_file": certificate, "server_name": "triton.test"}, False),  # no certificate of our own
            ({"ca_file": certificate, **ours, "server_name": "other.test"}, False),  # not the server's name
            (ours, False),  # an authority that the system does not know
            (None, False),  # no TLS at all
        ):
            settings = {"url": server.grpc_url, "tls": tls, "control_timeout_s": 2, "connect_timeout_s": 1}
            async with TritonClient(TritonConfig.model_validate(settings)) as client:
                assert await client.ready() is works, tls


# Settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "http://triton:8001"}, "without a scheme"),
        ({"url": "triton"}, "host:port"),
        ({"url": "triton:99999"}, "host:port"),
        ({"url": "triton:8001", "deadline_s": 0}, "deadline_s"),
        ({"url": "triton:8001", "deadline": 5}, "deadline"),
        ({"url": "triton:8001", "max_message_bytes": 1 << 31}, "max_message_bytes"),
        ({"url": "triton:8001", "tls": {"ca_file": "/does/not/exist.pem"}}, "ca_file"),
        ({"url": "triton:8001", "tls": {"client_cert_file": __file__}}, "belong together"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TritonConfig.model_validate(settings)


def test_every_setting_is_described() -> None:
    fields = {**TritonConfig.model_fields, **TritonTls.model_fields}
    assert [name for name, field in fields.items() if not field.description] == []


# The bundled launcher -------------------------------------------------------------------------------------------


def _listening(pid: int) -> set[str]:
    """Local addresses (hexadecimal, as in /proc/net/tcp) on which the process listens."""
    links = [os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir() if each.is_symlink()]
    inodes = {link[8:-1] for link in links if link.startswith("socket:[")}
    rows = [row.split() for table in ("tcp", "tcp6") for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


def test_launcher_is_available_and_listens_on_loopback_only(triton: BundledTriton) -> None:
    assert bundled_triton_available()[0]
    loopback = {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1 and ::ffff:127.0.0.1
    found = _listening(triton.pid)
    assert found
    assert found <= loopback


def test_launcher_leaves_nothing_behind(tmp_path: Path) -> None:
    models = build_truth_repository(tmp_path, *_small_masks(), name="small")
    with BundledTriton(models) as server:
        pid, url = server.pid, server.grpc_url
        assert list(Path("/dev/shm").glob(f"wetread_{os.getpid()}_*"))
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", int(url.split(":")[1])), timeout=1)


def test_model_that_does_not_load_is_told_with_the_log(tmp_path: Path) -> None:
    models = build_truth_repository(tmp_path, *_small_masks(), name="broken")
    (models / "broken" / "1" / "model.py").write_text("import no_such_library\n")
    with pytest.raises(BundledTritonError, match="no_such_library"), BundledTriton(models):
        pass


def test_missing_repository_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundledTritonError, match=r"nowhere is not a folder"), BundledTriton(tmp_path / "nowhere"):
        pass


def test_server_that_is_not_ready_in_time_is_ended(tmp_path: Path) -> None:
    models = build_truth_repository(tmp_path, *_small_masks(), name="lazy")
    model = models / "lazy" / "1" / "model.py"
    model.write_text("import time\ntime.sleep(3)\n" + model.read_text())
    with pytest.raises(BundledTritonError, match=r"not ready after 0\.5 s"), BundledTriton(models, ready_timeout_s=0.5):
        pass


OWNER = """
import sys, threading, time
from pathlib import Path
from deploy.triton.bundled import BundledTriton
server = BundledTriton(Path(sys.argv[1]))
starter = threading.Thread(target=server.__enter__)
starter.start()
starter.join()
time.sleep(0.5)
print(server.pid, flush=True)
time.sleep(60)
"""


def test_server_outlives_the_thread_that_started_it_and_dies_with_the_process(tmp_path: Path) -> None:
    models = build_truth_repository(tmp_path / "models", *_small_masks(), name="small")
    env = {**os.environ, "TMPDIR": str(tmp_path)}  # the killed owner cannot tidy up
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(models)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    assert _running(pid)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 15
    while _running(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _running(pid)


def _running(pid: int) -> bool:
    """Whether the process exists and is not a zombie that nobody has collected."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
