"""A release is one version everywhere, with one date, for the Pythons tried."""

import re
import tomllib
from pathlib import Path

import pytest

import fisherflow_jax as ff

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
CITATION = (ROOT / "CITATION.cff").read_text()
HEADINGS = re.findall(r"^## (.*)$", CHANGELOG, re.M)


def cited(field: str) -> str:
    return re.search(rf"^{field}: (\S+)$", CITATION, re.M)[1]


def supported() -> list[str]:
    line = r"Programming Language :: Python :: (3\.\d+)"
    found = (re.fullmatch(line, each) for each in PROJECT["project"]["classifiers"])
    return [each[1] for each in found if each]


def test_version_citation_and_changelog_agree():
    latest = next(each for each in HEADINGS if each != "Unreleased")
    assert latest == f"{ff.__version__} ({cited('date-released')})"
    assert cited("version") == ff.__version__
    assert cited("license") == PROJECT["project"]["license"]
    assert f"The {PROJECT['project']['name'].replace('-', '_')} authors" in CITATION


def test_versions_of_the_changelog_go_back_in_time():
    pairs = [
        re.fullmatch(r"(\d+)\.(\d+)\.(\d+) \((\d{4}-\d\d-\d\d)\)", each)
        for each in HEADINGS
        if each != "Unreleased"
    ]
    assert all(pairs), HEADINGS
    numbers = [tuple(int(part) for part in each.groups()[:3]) for each in pairs]
    assert numbers == sorted(set(numbers), reverse=True)
    dates = [each[4] for each in pairs]
    assert dates == sorted(dates, reverse=True)


def test_the_matrix_is_what_is_supported():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    matrix = re.findall(r'"(3\.\d+)"', re.search(r"python: \[.*\]", workflow)[0])
    assert matrix == supported()
    assert "run: .ci/run" in workflow
    oldest = supported()[0]
    assert PROJECT["project"]["requires-python"] == f">={oldest}"
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"


@pytest.mark.parametrize("name", ["sdist", "wheel"])
def test_what_is_built_is_there(name):
    target = PROJECT["tool"]["hatch"]["build"]["targets"][name]
    paths = target.get("only-include") or target["packages"]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert "fisherflow_jax" in paths
