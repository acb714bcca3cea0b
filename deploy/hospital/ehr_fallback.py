"""The fallback EHR: a small in-memory FHIR R4 server over HTTP, for machines without Java.

    python -m deploy.hospital.ehr_fallback --port 8080      serves http://127.0.0.1:8080/fhir

`$validate` is fhirkit's structural check of R4; HAPI's own also knows the value sets.
"""

import argparse
import json
from typing import Any
from urllib.parse import parse_qsl

import fhirkit
import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from deploy.hospital.fhir_memory import Memory, Refused, Resource, searchset
from deploy.hospital.process import LOOPBACK

FHIR_JSON = "application/fhir+json"


def fallback_app(memory: Memory) -> FastAPI:
    """The FHIR REST interface of `memory` under /fhir."""
    app = FastAPI(title="Fallback EHR", openapi_url=None)
    app.state.memory = memory
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _refused)
    app.add_api_route("/fhir/metadata", _metadata, methods=["GET"])
    app.add_api_route("/fhir", _transaction, methods=["POST"])
    app.add_api_route("/fhir/", _transaction, methods=["POST"])
    app.add_api_route("/fhir/{kind}/$validate", _validate, methods=["POST"])
    app.add_api_route("/fhir/{kind}", _search, methods=["GET"])
    app.add_api_route("/fhir/{kind}", _create, methods=["POST"])
    app.add_api_route("/fhir/{kind}", _conditional_update, methods=["PUT"])
    app.add_api_route("/fhir/{kind}/{resource_id}", _read, methods=["GET"])
    app.add_api_route("/fhir/{kind}/{resource_id}", _update, methods=["PUT"])
    app.add_api_route("/fhir/{kind}/{resource_id}", _delete, methods=["DELETE"])
    return app


async def _metadata() -> Response:
    return _answer(
        {
            "resourceType": "CapabilityStatement",
            "status": "active",
            "date": "2026-01-01",
            "kind": "instance",
            "fhirVersion": "4.0.1",
            "format": ["json"],
            "software": {"name": "Wetread's fallback EHR"},
            "implementation": {"description": "in memory, for machines without Java"},
            "rest": [{"mode": "server", "interaction": [{"code": "transaction"}]}],
        }
    )


async def _transaction(request: Request) -> Response:
    bundle = await _body(request)
    if bundle.get("type") != "transaction":
        raise Refused(400, "invalid", "only a Bundle of type transaction is taken here")
    return _answer(_memory(request).transaction(bundle))


async def _validate(request: Request, kind: str) -> Response:
    resource = await _body(request, kind)
    issues = [
        {"severity": i.severity, "code": "structure", "diagnostics": i.message, "expression": [i.path]}
        for i in fhirkit.validate(resource)
    ]
    fine = [{"severity": "information", "code": "informational", "diagnostics": "No issues"}]
    return _answer({"resourceType": "OperationOutcome", "issue": issues or fine})


async def _search(request: Request, kind: str) -> Response:
    parameters = parse_qsl(request.url.query, keep_blank_values=True)
    found = _memory(request).search(kind, parameters)
    return _answer(searchset(str(request.base_url) + "fhir", kind, found, parameters))


async def _create(request: Request, kind: str) -> Response:
    resource = await _body(request, kind)
    return _stored(*_memory(request).create(resource, request.headers.get("If-None-Exist", "")))


async def _conditional_update(request: Request, kind: str) -> Response:
    resource = await _body(request, kind)
    return _stored(*_memory(request).conditional_update(resource, request.url.query))


async def _read(request: Request, kind: str, resource_id: str) -> Response:
    return _stored(200, _memory(request).read(kind, resource_id))


async def _update(request: Request, kind: str, resource_id: str) -> Response:
    resource = await _body(request, kind)
    if resource.get("id") != resource_id:
        raise Refused(400, "invalid", "the resource's id is not the one in the address")
    return _stored(*_memory(request).update(resource, resource_id, request.headers.get("If-Match", "")))


async def _delete(request: Request, kind: str, resource_id: str) -> Response:
    _memory(request).delete(kind, resource_id)
    return Response(status_code=204)


async def _refused(_: Request, error: Exception) -> Response:
    status = error.status if isinstance(error, Refused) else getattr(error, "status_code", 500)
    code = error.code if isinstance(error, Refused) else "processing"
    issue = {"severity": "error", "code": code, "diagnostics": str(error)}
    return _answer({"resourceType": "OperationOutcome", "issue": [issue]}, status)


def _memory(request: Request) -> Memory:
    memory: Memory = request.app.state.memory
    return memory


async def _body(request: Request, kind: str = "Bundle") -> Resource:
    """The request's resource. Raises `Refused` 400 where it is none, or not a `kind`."""
    try:
        body: Any = json.loads(await request.body())
    except ValueError:
        raise Refused(400, "structure", "the body is not JSON") from None
    if not isinstance(body, dict) or body.get("resourceType") != kind or kind not in fhirkit.RESOURCE_TYPES:
        raise Refused(400, "invalid", f"the body is not a FHIR R4 {kind[:40]}")
    return body


def _stored(status: int, resource: Resource) -> Response:
    etag = f'W/"{resource["meta"]["versionId"]}"'
    location = f"/fhir/{resource['resourceType']}/{resource['id']}"
    return _answer(resource, status, {"ETag": etag, "Location": location})


def _answer(resource: Resource, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(resource), status, headers, FHIR_JSON)


def main() -> None:
    """Serve on loopback until terminated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    port = parser.parse_args().port
    uvicorn.run(fallback_app(Memory()), host=LOOPBACK, port=port, log_level="warning")


if __name__ == "__main__":
    main()
