"""The software bill of materials of this environment, CycloneDX 1.5 in JSON: `python -m backend.container.bill_of_materials`."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import Distribution, distributions
from typing import Any


def component(distribution: Distribution) -> dict[str, Any]:
    """One installed package: name, version, package URL, licence as its author states it."""
    metadata = distribution.metadata
    name = re.sub(r"[-_.]+", "-", metadata["Name"]).lower()
    made: dict[str, Any] = {
        "type": "library",
        "bom-ref": f"pkg:pypi/{name}@{distribution.version}",
        "name": name,
        "version": distribution.version,
        "purl": f"pkg:pypi/{name}@{distribution.version}",
    }
    stated = (metadata["License"] or "").strip() if "License" in metadata else ""
    if "License-Expression" in metadata:
        made["licenses"] = [{"expression": metadata["License-Expression"]}]
    elif stated and "\n" not in stated and len(stated) < 100:
        made["licenses"] = [{"license": {"name": stated}}]
    return made


def bill_of_materials() -> dict[str, Any]:
    """Everything installed for this Python, in order of names."""
    found = {each["bom-ref"]: each for each in map(component, distributions())}
    python = ".".join(map(str, sys.version_info[:3]))
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {"type": "container", "bom-ref": "nemo-triton", "name": "nemo-triton"}},
        "components": [
            {"type": "application", "bom-ref": "python", "name": "python", "version": python},
            *(found[reference] for reference in sorted(found)),
        ],
    }


if __name__ == "__main__":
    json.dump(bill_of_materials(), sys.stdout, indent=1)
