"""The code of docs/extending.md, run as it stands: its blocks in their order, then its tests with our fixtures."""

import inspect
import re
import sys
import types

import pytest

from attn_trainers.attnrl.exploration import CRITERIA
from attn_trainers.launch.credits import CREDITS
from tests.helpers import ROOT


PAGE = ROOT / "docs" / "extending.md"
SOURCE = "\n\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE))
TESTS = re.findall(r"^def (test_\w+)", SOURCE, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def page():
    """The page as a module; what it enters into the package's mappings is taken out again."""
    mappings = [(mapping, dict(mapping)) for mapping in (CRITERIA, CREDITS)]
    module = types.ModuleType("extending_page")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(SOURCE, str(PAGE), "exec"), vars(module))
        yield module
    finally:
        del sys.modules[module.__name__]
        for mapping, entries in mappings:
            mapping.clear()
            mapping.update(entries)


def test_the_page_has_code_and_tests():
    assert len(TESTS) == 5


@pytest.mark.parametrize("name", TESTS)
def test_of_the_page(page, request, name):
    test = getattr(page, name)
    test(**{argument: request.getfixturevalue(argument) for argument in inspect.signature(test).parameters})
