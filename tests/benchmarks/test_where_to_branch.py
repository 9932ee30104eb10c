"""The table of branch points tells what each criterion is defined by."""

import sys

import numpy as np
import pytest

from tests.helpers import ROOT


sys.path.insert(0, str(ROOT / "benchmarks"))  # as for a script that is run from there

import where_to_branch  # noqa: E402


@pytest.fixture(scope="module")
def args():
    return where_to_branch.Arguments(model="wired", num_problems=6)


@pytest.fixture(scope="module")
def solutions(args):
    return where_to_branch.read_solutions(args)


@pytest.fixture(scope="module")
def rules(args):
    return where_to_branch.rules(args)


def test_first_steps_are_the_second_and_third_and_the_oracle_takes_steps_that_matter(args, rules, solutions):
    assert len({solution.problem for solution in solutions}) == 6
    for seed, solution in enumerate(solutions):
        assert where_to_branch.branched_steps(args, rules["first_steps"], solution, seed) == [1, 2]
        for step in where_to_branch.branched_steps(args, rules["oracle"], solution, seed):
            assert solution.truth[step].matters


def test_attention_takes_steps_of_the_top_fifth_that_stand_apart(args, rules, solutions):
    whole = 0
    for solution in solutions:
        ranges, influence = solution.step_ranges, solution.signals[args.influence_delta].influence
        first, second = where_to_branch.branched_steps(args, rules["attention"], solution, 0)
        if first == 1:  # starts at token 10: too near, so one that fills up where candidates are missing
            continue
        whole += 1
        assert min(influence[first], influence[second]) >= np.quantile(influence, 0.8)
        assert ranges[first][0] >= 20 and ranges[second][0] >= ranges[first][1] + 20
    assert whole >= 2


def test_without_spacing_attention_is_first_steps(args, solutions):
    # Why the recipe sets a spacing: influence sums over later steps, and the earliest of the top fifth are taken.
    table = where_to_branch.table(args, solutions).splitlines()
    rows = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in table[2:]}
    assert rows["first_steps"][:2] == ["1.5", "100%"]
    assert rows["oracle"][2:4] == ["100%", "100%"]
    assert float(rows["attention, Δ = 4, no spacing"][1].rstrip("%")) >= 90
    assert float(rows["attention"][1].rstrip("%")) <= 60


def test_picture_and_table_are_written(args, tmp_path, capsys):
    where_to_branch.main(where_to_branch.Arguments(model="wired", num_problems=1, output_dir=str(tmp_path)))
    assert (tmp_path / "where_to_branch.png").stat().st_size > 10_000
    assert (tmp_path / "where_to_branch.md").read_text().strip() in capsys.readouterr().out
