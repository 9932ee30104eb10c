import math

from attn_trainers.attnrl.pipeline import Draw
from attn_trainers.attnrl.rollouts import PromptRollouts
from tests.helpers import float_array, make_continuation, make_rollout


def test_mean_influence_is_the_mean_of_the_rollouts_means():
    def rollout(influence):
        return make_rollout([1], influence=None if influence is None else float_array(*influence))

    prompt = PromptRollouts(Draw(0, 0), {}, [1], [rollout([0.0, 0.2, 0.4]), rollout([0.6]), rollout(None)])
    assert math.isclose(prompt.mean_influence(), (0.2 + 0.6) / 2, rel_tol=1e-6)
    assert PromptRollouts(Draw(0, 0), {}, [1], [rollout(None)]).mean_influence() == 0.0


def test_trees_carry_rewards_and_offsets():
    rollout = make_rollout([1, 2, 3], reward=1.0, branches=[make_continuation(2, [5], reward=0.0)])
    (tree,) = PromptRollouts(Draw(0, 0), {}, [9], [rollout]).trees()
    assert (tree.tokens, tree.reward) == ([1, 2, 3], 1.0)
    assert [(b.offset, b.tokens, b.reward) for b in tree.branches] == [(2, [5], 0.0)]
