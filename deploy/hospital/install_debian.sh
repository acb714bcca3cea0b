#!/bin/sh
# Installs what the simulator hospital needs from Debian, as root. A second run finds everything there and
# needs no network. It never fails a set-up: what cannot be installed is named, with what takes its place.

updated=no
update_once() {
    [ "$updated" = yes ] && return 0
    updated=yes
    apt-get update -qq >/dev/null 2>&1
}

installed() {
    dpkg-query -W -f='${Status}' "$1" 2>/dev/null | grep -q 'install ok installed'
}

# need FALLBACK PACKAGE...
need() {
    fallback=$1
    shift
    missing=
    for package in "$@"; do
        installed "$package" || missing="$missing $package"
    done
    [ -z "$missing" ] && return 0
    if command -v apt-get >/dev/null 2>&1; then
        update_once
        # shellcheck disable=SC2086  # one word a package
        if DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing \
            >/dev/null 2>&1; then
            echo "installed:$missing"
            return 0
        fi
    fi
    echo "not installed:$missing; $fallback"
}

need "PACS: falls back to a folder of DICOM files instead of Orthanc" orthanc orthanc-dicomweb
need "inference: the bundled Triton's Python backend cannot start" libpython3.11
need "DICOM checks with dcmtk (dsrdump, storescu) are not available" dcmtk
command -v java >/dev/null 2>&1 ||
    need "EHR: falls back to the in-memory FHIR server instead of HAPI" openjdk-17-jre-headless
# Maven builds HAPI's launcher, and that needs a compiler.
command -v javac >/dev/null 2>&1 ||
    need "EHR: falls back to the in-memory FHIR server unless HAPI is built already" openjdk-17-jdk-headless
command -v mvn >/dev/null 2>&1 ||
    need "EHR: falls back to the in-memory FHIR server unless HAPI is built already" maven
# `install_debian.sh tests`: also what only the tests and benchmarks use.
if [ "${1:-}" = tests ]; then
    need "the draft's test in a browser fails" chromium
    need "the tests on PostgreSQL fail" postgresql
    command -v openssl >/dev/null 2>&1 || need "the tests with TLS fail" openssl
    command -v npm >/dev/null 2>&1 || need "the tests of the sign-in at an EHR fail" npm
    command -v curl >/dev/null 2>&1 || need "the fetch benchmark has no rival" curl
fi
exit 0
