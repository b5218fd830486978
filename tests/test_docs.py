"""The documentation site has every public name; what a release says of itself agrees."""

import json
import re
from pathlib import Path

import pytest

import sedd
import sedd_ext

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def test_every_public_name_is_in_the_api_reference() -> None:
    """Those of sedd are re-exported: the page says so, and documents their modules whole."""
    page = (ROOT / "docs" / "api" / "sedd_ext.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\.\. auto(?:function|class|data):: (\w+)$", page, re.MULTILINE)
    assert sorted([*documented, "__version__", "reference"]) == sorted(sedd_ext.__all__)
    assert ".. automodule:: sedd_ext.reference" in page
    page = (ROOT / "docs" / "api" / "sedd.md").read_text(encoding="utf-8")
    sentence = re.search(r"`from sedd import \.\.\.` has (.*?)\.", page, re.DOTALL)
    assert sentence is not None
    assert sorted(re.findall(r"`(\w+)`", sentence[1])) == sorted(sedd.__all__)


def test_every_page_is_in_the_contents() -> None:
    """Sphinx warns of a page that is not; this test names it without Sphinx."""
    folder = ROOT / "docs"
    index = (folder / "index.md").read_text(encoding="utf-8").splitlines()
    pages = [path.relative_to(folder).with_suffix("").as_posix() for path in (*folder.rglob("*.md"), *NOTEBOOKS)]
    assert sorted(pages) == sorted(["index", *(page for page in pages if page in index)])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path: Path) -> None:
    code = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_the_version_is_the_same_everywhere() -> None:
    patterns = {
        "pyproject.toml": r'^version = "([^"+]+)',
        "CITATION.cff": r"^version: (\S+)$",
        "CHANGELOG.md": r"^## \[(\d[^]]*)\]",
    }
    found = {name: re.search(pattern, (ROOT / name).read_text(), re.MULTILINE) for name, pattern in patterns.items()}
    assert {match and match[1] for match in found.values()} == {sedd_ext.__version__.partition("+")[0]}
