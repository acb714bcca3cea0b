"""Turns FHIR answers into connector errors: HTTP status, OperationOutcome, entries of a transaction-response.

Source: FHIR R4 http.html (status codes), operationoutcome.html, bundle.html#transaction-response.
"""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

from connectors.errors import Ambiguous, ConnectorError, Permanent, Retryable

Json = dict[str, Any]

_MAX_ISSUES = 5
_MAX_ISSUE_CHARACTERS = 300
# 409: an edit conflict with someone else's transaction, gone by the next attempt.
_RETRYABLE_STATUS = (408, 409, 425, 429)


class _Headers(Protocol):
    def get(self, name: str, default: str, /) -> str: ...


def issues_of(resource: object) -> str:
    """The issues of an OperationOutcome as one line: severity, code, text, expression; '' if it is none."""
    if not isinstance(resource, dict) or resource.get("resourceType") != "OperationOutcome":
        return ""
    issues = resource.get("issue")
    lines = [_issue(one) for one in issues if isinstance(one, dict)] if isinstance(issues, list) else []
    more = f"; and {len(lines) - _MAX_ISSUES} more" if len(lines) > _MAX_ISSUES else ""
    return "; ".join(lines[:_MAX_ISSUES]) + more


def _issue(issue: Mapping[str, Any]) -> str:
    details = issue.get("details")
    text = issue.get("diagnostics") or (details.get("text") if isinstance(details, dict) else "") or ""
    places = issue.get("expression") or issue.get("location") or []
    where = f" at {', '.join(map(str, places))}" if isinstance(places, list) and places else ""
    return f"{issue.get('severity', '?')} {issue.get('code', '?')}: {text}"[:_MAX_ISSUE_CHARACTERS] + where


def retry_after_s(headers: _Headers) -> float | None:
    """Seconds the server asks to wait (RFC 9110 10.2.3: a number, or an HTTP date), None if it does not say."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (aware - datetime.now(UTC)).total_seconds())


def status_error(status: int, headers: _Headers, resource: object, where: str) -> ConnectorError | None:
    """The error that an HTTP status stands for, with the issues the server named; None for 2xx."""
    if 200 <= status < 300:
        return None
    said = issues_of(resource)
    detail = f" The server says: {said}" if said else ""
    if status in (401, 403):
        return Permanent(f"{where}: not allowed (HTTP {status}). Check token and its scopes.{detail}")
    if status in _RETRYABLE_STATUS or status >= 500:
        wait_s = retry_after_s(headers)
        return Retryable(f"{where}: cannot be done now (HTTP {status}).{detail}", retry_after_s=wait_s)
    if 300 <= status < 400:
        return Permanent(f"{where}: redirects elsewhere (HTTP {status}). Set url to the final address.")
    return Permanent(f"{where}: {_refusal(status)} (HTTP {status}).{detail}")


def _refusal(status: int) -> str:
    meanings = {
        404: "not there, or url is not the FHIR base",
        410: "deleted at the server",
        412: "a condition matches more than one resource, or an older version; a person must look",
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
            yield f"entry {number}: {_status(entry)[:40]} {issues_of(_response(entry).get('outcome'))}".rstrip()
