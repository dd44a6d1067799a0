"""pyproject.toml, constraints.txt and docs/dependencies.md agree with each other and with what is imported."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORT_NAMES = {"pyzmq": "zmq", "pyyaml": "yaml", "protobuf": "google"}
# Needed by a dependency at run time rather than imported by us; docs/dependencies.md says which one and why.
INDIRECT = {"jinja2", "numpy", "tokenizers"}
# Parts of a dependency that come with it.
PARTS = {"starlette": "fastapi"}


def name_of(requirement):
    """The distribution's name in a requirement, spelled as PyPI normalises it."""
    return re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("_", "-")


def third_party_imports():
    found = set()
    for path in (ROOT / "tandem").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"tandem"}


def test_imports_and_requirements_agree():
    extras = {name_of(r) for r in PROJECT["optional-dependencies"]["bench"]}
    required = {name_of(r) for r in PROJECT["dependencies"]}
    imported = {PARTS.get(name, name) for name in third_party_imports()}
    declared = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in required}
    assert imported - declared - extras == set(), "imported but not required"
    assert declared - imported - INDIRECT == set(), "required but not imported"


def test_each_requirement_has_its_reason():
    text = (ROOT / "docs" / "dependencies.md").read_text()
    for requirement in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["bench"]]:
        assert re.search(rf"^\|.*\b{name_of(requirement)}\b", text.replace("_", "-"), re.M | re.I), requirement


def test_constraints_cover_what_is_required():
    pinned = {name_of(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {name_of(r) for r in PROJECT["dependencies"]} - pinned == set()


def test_constraints_are_free_of_local_tags():
    assert "+" not in "".join(line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
