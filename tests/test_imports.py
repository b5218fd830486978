"""The house keeps its shape: no import circle, no wing that imports a wing above it, no file or function too long."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"sedd": ROOT / "python" / "sedd", "sedd_ext": ROOT / "sedd_ext"}
WINGS = {
    "sedd.network": set(),
    "sedd.adapted": {"sedd.network"},
    "sedd.diffusion": {"sedd.network"},
    "sedd.data": set(),
    "sedd.training": {"sedd.network", "sedd.adapted", "sedd.diffusion", "sedd.data"},
    "sedd.hub": {"sedd.network", "sedd.adapted", "sedd.diffusion", "sedd.data", "sedd.training"},
    "sedd.recipes": set(),
    "sedd.commands": {"sedd.network", "sedd.diffusion", "sedd.data", "sedd.training", "sedd.hub", "sedd.recipes"},
}
"""Which wings each wing may import. The modules beside them (config, options, files, ...) may be imported by all."""


def modules() -> dict[str, Path]:
    """Every module of both packages by its dotted name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def source(node: ast.ImportFrom, package: str) -> str:
    """The module that names are imported from. sedd_ext imports itself relatively, as the kernels hub renames it."""
    if package == "sedd_ext" and node.level == 1:
        return ".".join(filter(None, [package, node.module]))
    assert node.level == 0, "imports are absolute"
    module = str(node.module)
    assert not (package == "sedd_ext" and module.split(".")[0] == package), "sedd_ext imports itself relatively"
    return module


def imports(tree: ast.AST, known: set[str], package: str) -> set[str]:
    """The modules that a module imports anywhere: at its top, in functions, and for type checkers only."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = source(node, package)
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                found.add(inner if inner in known or inner == "sedd_ext._C" else module)
    return found & known


def graph() -> dict[str, set[str]]:
    known = modules()
    return {
        name: imports(ast.parse(path.read_text(encoding="utf-8")), set(known), name.split(".")[0]) - {name}
        for name, path in known.items()
    }


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The modules of a circle in their order, or nothing."""
    state: dict[str, int] = {}

    def visit(name: str, path: list[str]) -> list[str]:
        if state.get(name) == 1:
            return path[path.index(name) :]
        if state.get(name) == 2:
            return []
        state[name] = 1
        for other in sorted(edges[name]):
            if found := visit(other, [*path, name] if name not in path else path):
                return found
        state[name] = 2
        return []

    for name in edges:
        if found := visit(name, []):
            return found
    return []


def wing_of(module: str) -> str | None:
    return next((wing for wing in WINGS if module == wing or module.startswith(f"{wing}.")), None)


# sedd/__init__.py names what it imports on first use, for type checkers; nothing inside the package imports from it
INSIDE = {name: found - {"sedd"} for name, found in graph().items() if name != "sedd"}


def test_no_import_circle() -> None:
    assert circle(INSIDE) == []


def test_nothing_imports_from_the_top_of_its_own_package() -> None:
    assert [name for name, found in graph().items() if name.startswith("sedd.") and "sedd" in found] == []


@pytest.mark.parametrize("edge", [("sedd_ext.process", "sedd_ext.reverse"), ("sedd.files", "sedd.training.run")])
def test_a_circle_is_noticed(edge: tuple[str, str]) -> None:
    start, end = edge
    assert end in circle({**INSIDE, start: INSIDE[start] | {end}})


def test_no_wing_imports_one_above_it() -> None:
    up = [
        f"{name} -> {other}"
        for name, found in INSIDE.items()
        for other in found
        if (wing := wing_of(name)) and (theirs := wing_of(other)) and theirs != wing and theirs not in WINGS[wing]
    ]
    assert up == []


def test_storeys() -> None:
    """sedd_ext never imports sedd, and only sedd_ext imports the compiled module."""
    for name, path in modules().items():
        names = {
            f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        if name.startswith("sedd_ext"):
            assert not any(other == "sedd" or other.startswith("sedd.") for other in names), name
        else:
            assert not any(other.startswith("sedd_ext._C") for other in names), name
