"""`make floors`: write the lowest allowed versions to a file of constraints for an environment.

A floor that cannot be installed, because another package needs a newer version, is never tried: it
is refused with the version to write instead.
"""

from __future__ import annotations

import sys
from pathlib import Path

from packaging.version import Version

from tests.kit.dependencies import EVERYTHING, chosen, declared, floor


def main(constraints: Path) -> int:
    lowest = chosen("--resolution", "lowest-direct")
    constraints.parent.mkdir(parents=True, exist_ok=True)
    constraints.write_text("".join(f"{name}=={lowest[name]}\n" for name in lowest))
    wrong = 0
    for name, requirement in declared(EVERYTHING).items():
        print(f"{name} {lowest[name]}")
        if Version(lowest[name]) != Version(floor(requirement)):
            wrong += 1
            print(f"pyproject.toml: {requirement} is never tried: write {name}>={lowest[name]}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
