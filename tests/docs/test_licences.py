"""docs/licences.md names every dependency of pyproject.toml, with the licences that its own metadata names."""

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

if sys.version_info < (3, 11):
    pytest.skip("tomllib came with Python 3.11", allow_module_level=True)
import tomllib

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
LISTED = {name: licence.strip() for name, licence, _ in ROW.findall((ROOT / "docs" / "licences.md").read_text())}


FAMILIES = ("apache", "bsd", "mit", "mpl", "gpl", "psf", "python software", "zlib", "cc0")


def families(text):
    return {name for name in FAMILIES if re.search(rf"\b{name}\b|\b{name}(?=-)", text.lower())}


def required():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return sorted({re.split(r"[ ><=\[;]", one)[0] for every in lists for one in every} - {"stablekd_fast"})


def licence_of(name):
    """What a package that is installed says of its licence, in few words; None if it is not installed."""
    try:
        metadata = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    classified = [one.split(" :: ")[-1] for one in metadata.get_all("Classifier") or [] if one.startswith("License ::")]
    said = metadata.get("License-Expression") or metadata.get("License") or ""
    return said if said and len(said) < 200 and "\n" not in said else ", ".join(classified) or "MIT"


def test_every_dependency_is_listed_and_no_other():
    assert sorted(LISTED) == required()


@pytest.mark.parametrize("name", required())
def test_no_package_names_another_licence(name):
    """Its words may differ from version to version."""
    found = licence_of(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    assert families(found) <= families(LISTED[name]), f"{name} is under {found}"
