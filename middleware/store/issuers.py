"""The assigning authorities of patient ids that a site has listed, each with all its names: what DICOM calls the
issuer, HL7 the namespace and FHIR the system of one authority is seldom the same word."""

from collections.abc import Sequence

Issuers = Sequence[Sequence[str]]
"""Each entry has the names of one authority (settings `site.issuers`)."""


def names_of_issuer(name: str, issuers: Issuers) -> frozenset[str]:
    """All names of the authority of this name, itself among them; none of one that is not stated."""
    listed = next((names for names in issuers if name in names), ())
    return frozenset((name, *listed)) if name else frozenset()


def are_same_issuer(one: str, other: str, issuers: Issuers) -> bool:
    """Whether two stated names are of one authority as far as is known: the same word, or listed together."""
    return bool(one) and other in names_of_issuer(one, issuers)


def may_be_same_issuer(one: str, other: str, issuers: Issuers) -> bool:
    """Whether two names of one system may be of one authority: either is not stated, or they are the same."""
    return not one or not other or are_same_issuer(one, other, issuers)


def are_other_issuers(one: str, other: str, issuers: Issuers) -> bool:
    """Whether two names, of whatever systems, are known to be of different authorities. Names that the site has not
    listed tell nothing."""
    groups = [next((n for n, names in enumerate(issuers) if name in names), None) for name in (one, other)]
    return None not in groups and groups[0] != groups[1]
