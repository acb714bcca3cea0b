"""Turns FHIR answers into connector errors: HTTP status, OperationOutcome, entries of a transaction-response.

Source: FHIR R4 http.html (status codes), operationoutcome.html, bundle.html#transaction-response.
"""

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

from connectors.errors import Ambiguous, ConnectorError, Permanent, Retryable

Json = dict[str, Any]

_MAX_ISSUES = 5
_MAX_RETRY_AFTER_S = 86_400.0
_RETRYABLE_STATUS = (408, 425, 429)
# R4 issue-type codes (valueset-issue-type.html) that tell a conflict which is gone by the next attempt from one that
# every attempt will meet.
_PASSING = frozenset({"transient", "lock-error", "timeout", "throttled", "incomplete"})
_LASTING = frozenset(
    {"invalid", "structure", "required", "value", "invariant", "business-rule", "multiple-matches", "deleted"}
    | {"not-supported", "code-invalid", "extension", "too-long", "too-costly"}
)
# What may stand in an error message: codes and the paths of elements. Texts and values may name a patient.
_CODE = re.compile(r"[A-Za-z0-9_\-]{1,40}")
_PATH = re.compile(r"[A-Za-z][A-Za-z0-9.\[\]]{0,119}")


class _Headers(Protocol):
    def get(self, name: str, default: str, /) -> str: ...


def issues_of(resource: object) -> str:
    """The issues of an OperationOutcome as one line: severity, code, coded detail, element; '' if it is none.

    The server's own texts are left out, since they may name a patient; they are in the answer that is kept.
    """
    lines = [_issue(one) for one in _issues(resource)]
    more = f"; and {len(lines) - _MAX_ISSUES} more" if len(lines) > _MAX_ISSUES else ""
    return "; ".join(lines[:_MAX_ISSUES]) + more


def _issues(resource: object) -> list[Json]:
    if not isinstance(resource, dict) or resource.get("resourceType") != "OperationOutcome":
        return []
    issues = resource.get("issue")
    return [one for one in issues if isinstance(one, dict)] if isinstance(issues, list) else []


def _issue(issue: Mapping[str, Any]) -> str:
    details = issue.get("details")
    codings = details.get("coding") if isinstance(details, dict) else []
    listed = codings if isinstance(codings, list) else []
    coded = [_safe(_CODE, each.get("code")) for each in listed if isinstance(each, dict)]
    places = issue.get("expression") or issue.get("location") or []
    paths = [_safe(_PATH, each) for each in places] if isinstance(places, list) else []
    what = f"{_safe(_CODE, issue.get('severity'))} {_safe(_CODE, issue.get('code'))}"
    told = [f"({', '.join(coded[:3])})"] if coded else []
    return " ".join([what, *told, *([f"at {', '.join(paths[:5])}"] if paths else [])])


def _safe(allowed: re.Pattern[str], value: object) -> str:
    return value if isinstance(value, str) and allowed.fullmatch(value) else "?"


def retry_after_s(headers: _Headers) -> float | None:
    """Seconds the server asks to wait (RFC 9110 10.2.3: a number, or an HTTP date), None if it does not say.

    A day at most: a server that asks for longer, or forever, is asked again tomorrow.
    """
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return min(float(value[:20]), _MAX_RETRY_AFTER_S)
    try:
        moment = parsedate_to_datetime(value)
        aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return min(max(0.0, (aware - datetime.now(UTC)).total_seconds()), _MAX_RETRY_AFTER_S)
    except (ValueError, TypeError, OverflowError):
        return None


def status_error(
    status: int, headers: _Headers, resource: object, where: str, access: str = "Check token and its scopes."
) -> ConnectorError | None:
    """The error that an HTTP status stands for, with the issues the server named; None for 2xx.

    `access` is the next step where we are not let in.
    """
    if 200 <= status < 300:
        return None
    said = issues_of(resource)
    detail = f" The server says: {said}." if said else ""
    if status in (401, 403):
        return Permanent(f"{where}: not allowed (HTTP {status}). {access}{detail}")
    if _may_pass(status, {str(one.get("code")) for one in _issues(resource)}):
        wait_s = retry_after_s(headers)
        return Retryable(f"{where}: cannot be done now (HTTP {status}).{detail}", retry_after_s=wait_s)
    if 300 <= status < 400:
        return Permanent(f"{where}: redirects elsewhere (HTTP {status}). Set url to the final address.")
    return Permanent(f"{where}: {_refusal(status)} (HTTP {status}).{detail}")


def _may_pass(status: int, codes: set[str]) -> bool:
    """Whether the same request may succeed later.

    409 is an edit conflict with someone else's transaction, and passes unless the issues say that the content is
    refused. 412 says that a condition matches several resources, and lasts unless they say that it passes.
    """
    if status in (409, 412):
        return bool(codes & _PASSING) or (status == 409 and not codes & _LASTING)
    return status in _RETRYABLE_STATUS or (status >= 500 and status not in (501, 505))


def _refusal(status: int) -> str:
    meanings = {
        404: "not there, or url is not the FHIR base",
        409: "conflicts with what the server holds, and will again; a person must look",
        410: "deleted at the server",
        412: "a condition matches more than one resource, or an older version; a person must look",
        413: "larger than the server takes; raise its limit",
        501: "the server cannot do this at all; have it enabled",
    }
    return meanings.get(status, "refused; correct what was sent, or what the server is set up to take")


def check_transaction(answer: object, sent_entries: int, where: str) -> Json:
    """The transaction-response, once every entry of it says 2xx.

    Raises Permanent naming the entries that failed, Ambiguous for a success that does not account for all.
    """
    if not isinstance(answer, dict) or answer.get("resourceType") != "Bundle":
        raise Ambiguous(f"{where}: the server said success but sent no Bundle; look there before sending it again.")
    listed = answer.get("entry")
    entries = listed if isinstance(listed, list) else []
    if failed := list(_failures(entries)):
        raise Permanent(f"{where}: the server refused {len(failed)} of {sent_entries} entries: {'; '.join(failed)}")
    done = sum(_status(entry).startswith(("2", "304")) for entry in entries)
    if done != sent_entries:
        raise Ambiguous(
            f"{where}: the server said success but accounts for {done} of {sent_entries} entries; "
            "look there before sending it again."
        )
    return answer


def _response(entry: object) -> Json:
    response = entry.get("response") if isinstance(entry, dict) else None
    return response if isinstance(response, dict) else {}


def _status(entry: object) -> str:
    return str(_response(entry).get("status", ""))


def _failures(entries: list[object]) -> Iterator[str]:
    for number, entry in enumerate(entries, 1):
        if _status(entry).startswith(("4", "5")):
            yield f"entry {number}: {_status(entry)[:3]} {issues_of(_response(entry).get('outcome'))}".rstrip()
