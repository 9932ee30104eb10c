"""What the probe says in words."""

from attn_trainers.attnrl.branching_report import BranchingReport
from attn_trainers.probes.report import cell, compared, conclusions
from attn_trainers.probes.statistics import Interval, Tree


def trees(mixed: int, prompts: int = 20, offsets=(2, 5)) -> list[Tree]:
    """One tree a prompt, the first ones mixed, the others all wrong; 30 tokens each."""
    return [Tree(p, 0.0, 10, list(offsets), 0, 1, [float(p < mixed), 0.0], [10, 10]) for p in range(prompts)]


def test_more_mixed_trees_are_said_to_be_more():
    text = compared({"attention": trees(20), "random": trees(0)}, "random", seed=0)
    assert text == (
        "Mixed trees: 100.0% by attention against 0.0% by random, difference 100.0 [100.0, 100.0] points, each for 30 "
        "against endless tokens: attention gives more with 20 prompts."
    )
    assert "random gives more with 20 prompts" in compared({"attention": trees(0), "random": trees(20)}, "random", 0)


def test_an_interval_with_zero_shows_nothing():
    text = compared({"attention": trees(5), "random": trees(6)}, "random", seed=0)
    assert "difference -5.0 [-15.0, 0.0] points" in text and "no difference is shown with 20 prompts" in text
    assert "5 points would take about 45 prompts to show" in text  # 20 · (7.5 / 5)²
    assert "the same in each of 20 prompts" in compared({"attention": trees(5), "random": trees(5)}, "random", 0)


def test_what_makes_a_comparison_empty_is_said():
    choice = BranchingReport(20, 5.0, 0.4, 0.1, 0.6, 0.3, "")
    grown = {"attention": trees(0), "entropy": trees(0), "random": trees(0, offsets=())}
    lines = conclusions(grown, choice, [], seed=0)
    assert lines[0] == "Attention chooses: 40% of its points are its own."
    assert lines[1] == "Mixed trees: none by attention or entropy with 20 prompts; nothing can be compared."
    assert "20 of 20 rollouts have no place to branch by random." in lines
    assert any(line.startswith("At least 100% of the prompts are all wrong by every criterion") for line in lines)
    assert lines[-1].startswith("Disruption: no right rollout has a step with a number")


def test_cells():
    assert cell(Interval(0.5, 0.25, float("inf")), 100, 1) == "50.0 [25.0, ∞]"
    assert cell(Interval(*[float("nan")] * 3), 1, 0) == "–"
