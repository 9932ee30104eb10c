"""Sizes that keep the house readable, and what it imports; the floors are checked by `make lint`."""

import ast
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers import ROOT


LARGEST_FILE, LARGEST_FUNCTION = 450, 60


def imported_packages() -> set[str]:
    """Top names of all that the package imports from outside, anywhere in its modules."""
    names = set()
    for path in (ROOT / "attn_trainers").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names)


def test_what_is_imported_is_required_or_comes_with_what_is():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    required = {Requirement(line).name for line in setup["options"]["install_requires"].split("\n") if line}
    found = {canonicalize_name(name) for name in required}
    for name in required:
        needs = [Requirement(line) for line in requires(name)]
        found |= {
            canonicalize_name(need.name)
            for need in needs
            if need.marker is None or need.marker.evaluate({"extra": ""})
        }
    owners = packages_distributions()
    for name in imported_packages() - {"vllm"}:  # of the extra of that name
        assert found & {canonicalize_name(owner) for owner in owners.get(name, [])}, f"{name} comes with nothing"


def test_files_and_functions_stay_small():
    large = []
    for path in sorted((ROOT / "attn_trainers").rglob("*.py")):
        text = path.read_text()
        if len(text.splitlines()) > LARGEST_FILE:
            large.append(f"{path.name}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                documented = ast.get_docstring(node, clean=False) is not None
                first = node.body[1] if documented and len(node.body) > 1 else node.body[0]
                lines = node.end_lineno - first.lineno + 1
                if lines > LARGEST_FUNCTION:
                    large.append(f"{path.name}, {node.name}: {lines} lines")
    assert not large
