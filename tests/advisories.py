"""`make advisories`: look up the packages of run time in the public database of advisories.

Both the versions in this environment and the lowest that pyproject.toml allows. A finding is a
failure. Where the database cannot be reached nothing is checked, which is printed.

Source: https://google.github.io/osv.dev/api/
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tests.kit.dependencies import chosen

DATABASE = "https://api.osv.dev/v1"
TIMEOUT_S = 10.0
KNOWN_HOLE = {"h11": "0.14.0"}
"""CVE-2025-43859: where the database does not find it, our queries are wrong."""
OUR_FAULT = 400
"""The status of a query that the database cannot read."""


def main(database: str = DATABASE, timeout_s: float = TIMEOUT_S) -> int:
    try:
        if not findings(KNOWN_HOLE, database, timeout_s):
            print("the database of advisories does not know what it must know: correct the query")
            return 1
        found = [
            f"{versions}: {finding}"
            for versions, packages in (("installed", installed()), ("lowest allowed", lowest()))
            for finding in findings(packages, database, timeout_s)
        ]
    except OSError as error:
        if isinstance(error, HTTPError) and error.code == OUR_FAULT:
            raise
        print(f"NOT CHECKED: no network to the database of advisories ({error})")
        return 0
    print("\n".join(found) or "no advisory names an installed or a lowest allowed version")
    return 1 if found else 0


def installed() -> dict[str, str]:
    """Return the packages of run time in this environment, without the tools of development."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        for package in metadata.distributions():
            constraints.write(f"{package.name}=={package.version}\n")
        constraints.flush()
        return chosen("--constraints", constraints.name)


def lowest() -> dict[str, str]:
    return chosen("--resolution", "lowest-direct")


def findings(packages: Mapping[str, str], database: str, timeout_s: float) -> list[str]:
    """Return a line for each advisory that names one of these versions.

    Args:
        packages: Version by name.
    """
    queries = [
        {"package": {"name": name, "ecosystem": "PyPI"}, "version": version}
        for name, version in packages.items()
    ]
    results = _answer(f"{database}/querybatch", {"queries": queries}, timeout_s)["results"]
    found = []
    for (name, version), result in zip(packages.items(), results, strict=True):
        for advisory in result.get("vulns", ()):
            about = _answer(f"{database}/vulns/{advisory['id']}", None, timeout_s)
            if "withdrawn" not in about:
                found.append(f"{name} {version}: {advisory['id']} {about.get('summary', '')}")
    return found


def _answer(url: str, body: object, timeout_s: float) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data, {"Content-Type": "application/json"})
    with urlopen(request, timeout=timeout_s) as answer:
        return json.load(answer)


if __name__ == "__main__":
    sys.exit(main())
