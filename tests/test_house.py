"""Sizes that keep the house readable; the floors are checked by `make lint`."""

import ast

from tests.helpers import ROOT


LARGEST_FILE, LARGEST_FUNCTION = 450, 60


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
