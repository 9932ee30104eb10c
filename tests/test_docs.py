"""What README and docs tell to type exists: scripts, options, make targets, files; code blocks compile, links lead
somewhere, and docs/your_data.md runs."""

import configparser
import contextlib
import functools
import importlib
import io
import re
import runpy
import shlex
import sys

import pytest

from attn_trainers.commands import COMMANDS
from attn_trainers.launch.credits import CREDITS
from attn_trainers.launch.launcher import recipe_names
from tests.helpers import ROOT


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
SCRIPT = re.compile(r"(recipes|benchmarks|docs)/\w+\.py")
OPTION = re.compile(r"--[A-Za-z]\w*")
# Options that a parser takes without telling of them.
SILENT = {"--config", "--help"}
# Options of other programs that the pages name by themselves.
FOREIGN = {"--config_file", "--num_processes", "--num_machines", "--machine_rank", "--main_process_ip"}


def blocks(page, *languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(page.read_text()) if language in languages]


def commands(page) -> list[str]:
    """Lines of shell blocks, continued ones joined and comments left out, and the inline code."""
    text = page.read_text()
    shell = "\n".join(blocks(page, "bash", "shell", "sh")).replace("\\\n", " ")
    lines = [part for line in shell.splitlines() for part in re.split(r"&&|\|\||;", line)]
    return [*lines, *SPAN.findall(FENCE.sub("", text))]


def words_of(command: str) -> list[str]:
    try:
        return shlex.split(command, comments=True)
    except ValueError:  # an apostrophe in inline text
        return command.split()


@functools.cache
def options_of(script: str, *first: str) -> frozenset[str]:
    """The options that a script names in its help."""
    output, code = io.StringIO(), None
    before = sys.argv, sys.path
    sys.argv, sys.path = [script, *first, "--help"], [str((ROOT / script).parent), *sys.path]
    try:
        with contextlib.redirect_stdout(output):
            if script.endswith(".py"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                console_script(script)()
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.argv, sys.path = before
    assert not code, (script, code)
    return frozenset(OPTION.findall(output.getvalue())) | SILENT


def console_script(name: str):
    """The function behind a command that setup.cfg installs."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup.get("options.entry_points", "console_scripts", fallback="").split("\n")
    module, _, function = dict(map(str.strip, line.split("=")) for line in lines if "=" in line)[name].partition(":")
    return getattr(importlib.import_module(module), function)


def recipe_of(words: list[str]) -> int:
    """Where the recipe stands behind `attn-trainers train`; it must be there."""
    place = next((i for i, word in enumerate(words) if word in recipe_names() or word.endswith(".py")), None)
    assert place is not None, words
    return place


def check(command: str) -> None:
    """Fail for a script, configuration, test, make target or option that is not there."""
    words = words_of(command)
    for word in words:
        if re.fullmatch(r"(recipes|benchmarks|docs|tests|accelerate_configs|attn_trainers)/[\w/.]+", word):
            assert (ROOT / word).exists() or (ROOT / f"{word}.py").exists(), word
    if words[:1] == ["make"]:
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert all(word in targets for word in words[1:] if word.isidentifier() and word.islower()), command
    place = next((i for i, word in enumerate(words) if SCRIPT.fullmatch(word) or word == "attn-trainers"), None)
    if place is None:
        return
    own = words[place + 1 :]
    if own[:1] in (["train"], ["preflight"]):  # options of `accelerate launch`, a recipe, its options
        at = recipe_of(own)
        words = [f"recipes/{own[at]}.py"] if own[at] in recipe_names() else [own[at]]
        own, place = own[at + 1 :], 0
    first = own[:1] if words[place] == "attn-trainers" and own and not own[0].startswith("-") else []
    if first and first[0].isupper():  # a placeholder
        return
    assert words[place] != "attn-trainers" or not first or first[0] in COMMANDS, command
    credit = own[own.index("--credit") + 1] if "--credit" in own[:-1] else None
    if credit is not None and credit not in CREDITS:  # a method that the reader adds, with options of its own
        return
    first += ["--credit", credit] if credit else []
    first += ["--compare", "A", "B"] * ("--compare" in own)  # a tool that compares takes other options
    if any(word.startswith("--") for word in own) or first:
        known = options_of(words[place], *first)
        for word in own:
            if match := OPTION.match(word):
                assert match[0] in known, f"{match[0]} is no option of {words[place]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_exist(page):
    for command in commands(page):
        check(command)


def test_options_named_alone_exist_somewhere():
    paths = [path for folder in ("recipes", "benchmarks") for path in (ROOT / folder).glob("*.py")]
    scripts = sorted(path.relative_to(ROOT).as_posix() for path in paths)
    known = frozenset().union(*(options_of(script) for script in scripts)) | FOREIGN
    known |= options_of("recipes/attnrl_1p5b.py", "--credit", "rhythm")
    known |= frozenset().union(*(options_of("attn-trainers", command) for command in COMMANDS))
    for page in PAGES:
        for span in SPAN.findall(FENCE.sub("", page.read_text())):
            if span.startswith("--"):
                missing = set(OPTION.findall(span)) - known
                assert not missing, f"{page.name}: {missing}"


def test_a_wrong_command_is_found():
    for command in (
        "accelerate launch --config_file accelerate_configs/none.yaml recipes/attnrl_tiny.py",
        "python recipes/none.py",
        "recipes/attnrl_tiny.py --no_such_option 3",
        "attn-trainers evalute --model M",
        "attn-trainers evaluate --no_such_option 3",
        "attn-trainers train --config_file zero2 attnrl_2b",
        "attn-trainers train --config_file zero2 attnrl_1p5b --no_such_option 3",
        "make nothing",
    ):
        with pytest.raises(AssertionError):
            check(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_compiles_and_links_lead_somewhere(page):
    for code in blocks(page, "python"):
        compile(code, page.name, "exec")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", FENCE.sub("", page.read_text())):
        if not target.strip().startswith(("http", "mailto")):
            assert (page.parent / target).exists(), target


def test_the_page_about_your_data_runs(tmp_path, tiny_model_dir, tiny_tokenizer):
    names = {"folder": tmp_path, "model": str(tiny_model_dir), "tokenizer": tiny_tokenizer}
    page = ROOT / "docs" / "your_data.md"
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), names)
    names["trainer"].train()
    assert names["trainer"].state.global_step == 1
