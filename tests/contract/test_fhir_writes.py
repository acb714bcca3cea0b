"""The FHIR connector writes single resources and calls operations: only what may be repeated, only where it says."""

import json
from typing import Any

import pytest

from connectors.errors import Ambiguous, Permanent, Retryable
from tests.contract.test_fhir import closing, outcome
from tests.fhir_peer import Answer, client, peer, said

Json = dict[str, Any]

SUBSCRIPTION: Json = {"resourceType": "Subscription", "id": "7", "status": "requested"}
CONDITION = {"url": "https://w.example/fhir?a=b&c", "criteria:exact": "ServiceRequest?"}


async def test_create_is_conditional_and_asks_for_the_whole_resource() -> None:
    with peer(said(SUBSCRIPTION, 201)) as server:
        async with closing(client(server, token="secret-1")) as fhir:
            assert await fhir.create({**SUBSCRIPTION, "id": None}, if_none_exist=CONDITION) == SUBSCRIPTION
    ((method, path, headers, body),) = server.requests
    assert (method, path) == ("POST", "/fhir/Subscription")
    # Encoded: HAPI takes the `?` of a value for the start of the parameters otherwise.
    expected = "url=https%3A%2F%2Fw.example%2Ffhir%3Fa%3Db%26c&criteria%3Aexact=ServiceRequest%3F"
    assert headers["If-None-Exist"] == expected
    assert headers["Prefer"] == "return=representation"
    assert headers["Authorization"] == "Bearer secret-1"
    assert json.loads(body)["status"] == "requested"


async def test_update_puts_to_the_resources_own_address() -> None:
    with peer(said({**SUBSCRIPTION, "status": "active"})) as server:
        async with closing(client(server)) as fhir:
            assert (await fhir.update(SUBSCRIPTION))["status"] == "active"
    ((method, path, _, body),) = server.requests
    assert (method, path, json.loads(body)) == ("PUT", "/fhir/Subscription/7", SUBSCRIPTION)


async def test_operation_is_asked_of_one_resource() -> None:
    with peer(said({"resourceType": "Bundle", "type": "history"})) as server:
        async with closing(client(server)) as fhir:
            numbers = {"eventsSinceNumber": "3", "eventsUntilNumber": "5"}
            assert (await fhir.operation("Subscription/7", "$events", numbers))["type"] == "history"
    ((method, path, _, _),) = server.requests
    assert (method, path) == ("GET", "/fhir/Subscription/7/$events?eventsSinceNumber=3&eventsUntilNumber=5")


async def test_a_search_asks_for_how_things_stand_now() -> None:
    with peer(said({"resourceType": "Bundle"})) as server:
        async with closing(client(server)) as fhir:
            await fhir.search("ServiceRequest", {})
    assert server.requests[0][2]["Cache-Control"] == "no-cache"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (None, Retryable),
        (said(outcome(), 503), Retryable),
        (said(outcome(), 504), Retryable),
        (said(outcome(), 400), Permanent),
        (said(outcome(), 403), Permanent),
        (said(outcome(), 412), Permanent),
        ((201, {}, b""), Ambiguous),
        ((200, {}, b"<html>"), Ambiguous),
        (said([]), Permanent),
        (said({"no": "type"}), Permanent),
    ],
)
async def test_faults_of_a_write(answer: Answer, error: type[Exception]) -> None:
    with peer(answer) as server:
        async with closing(client(server)) as fhir:
            for call in (fhir.create(SUBSCRIPTION, if_none_exist=CONDITION), fhir.update(SUBSCRIPTION)):
                with pytest.raises(error, match=r"(create|update) of Subscription"):
                    await call


@pytest.mark.parametrize("resource", [{}, {"resourceType": "x"}, {"resourceType": "A/../B", "id": "1"}])
async def test_what_is_no_resource_is_not_sent(resource: Json) -> None:
    with peer(said(SUBSCRIPTION)) as server:
        async with closing(client(server)) as fhir:
            for call in (fhir.create(resource, if_none_exist=CONDITION), fhir.update(resource)):
                with pytest.raises(Permanent):
                    await call
            with pytest.raises(Permanent, match="no condition"):
                await fhir.create(SUBSCRIPTION, if_none_exist={})
            with pytest.raises(Permanent, match="no type or id"):
                await fhir.update({"resourceType": "Subscription", "id": "7/../8"})
    assert server.requests == []


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("Subscription/7", "events"),
        ("Subscription/7", "$events/../x"),
        ("Subscription/7/_history/1", "$events"),
        ("Subscription", "$events"),
        ("http://elsewhere/Subscription/7", "$events"),
        ("Subscription/../7", "$events"),
    ],
)
async def test_operation_of_anything_else_is_not_asked(reference: str, name: str) -> None:
    with peer(said(SUBSCRIPTION)) as server:
        async with closing(client(server)) as fhir:
            with pytest.raises(Permanent, match="operation"):
                await fhir.operation(reference, name, {})
    assert server.requests == []
