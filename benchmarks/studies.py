"""The training runs that count, as a table: what `run_arms.py` runs; `docs/evidence.md` has the reasons."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Study:
    """Arms of one recipe that differ in nothing but what the study asks about.

    Attributes:
        question: what the study is to answer, the title of its table.
        recipe: script, relative to the repository.
        settings: options of every arm.
        arms: name to the options that make the arm.
        against: arms that all others are compared with.
        seeds: seeds of each arm; arms are paired by seed.
        seed_option: option that takes the seed.
        budget: generated tokens of a run; 0: all arms make the updates that the settings say.
        eval_every: generated tokens between points of the curve.
    """

    question: str
    recipe: str
    settings: dict[str, object]
    arms: dict[str, dict[str, object]]
    against: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    seed_option: str = "seed"
    budget: int = 0
    eval_every: int = 0

    def options(self, arm: str) -> dict[str, object]:
        """Options of an arm, without its seed and its folder."""
        limits = {"max_generated_tokens": self.budget, "eval_every_tokens": self.eval_every}
        return self.settings | self.arms[arm] | {name: value for name, value in limits.items() if value}


CRITERIA = {name: {"branching": name} for name in ("attention", "entropy", "random", "first_steps")}
# As many rows a prompt as a tree of 4 rollouts with 2 branch points, none of them branched.
OUTCOME = {"num_branch_points": 0, "num_rollouts": 12}
UNLIMITED = 100_000  # updates: the budget ends the run
TREES = {"max_steps": UNLIMITED, "disable_tqdm": True}
DEPENDENCIES = {"task": "dependencies", "use_vllm": True, "num_eval_problems": 400, "num_eval_samples": 1}
AT_TOKENS = {"budget": 300_000, "eval_every": 150_000}
# As `recipes/attnpo_tiny.py` has it; its scales are in full force after 30 updates.
ATTNPO = {"credit": "attnpo", "credit_step_mode": "paragraphs", "length_penalty": 0.4}
ATTNPO |= {"schedule_fraction": 30 / UNLIMITED}
SCHEMES = ("random", "none", "entropy", "local", "global", "coupled", "coupled_bottom", "reward_split")

STUDIES: dict[str, Study] = {
    "chain_branching": Study(
        question="Does the driver tell arms apart on the chain task? (a trial)",
        recipe="recipes/attnrl_tiny.py",
        settings=TREES | {"use_vllm": False, "num_eval_problems": 200},
        arms={name: CRITERIA[name] for name in ("attention", "random", "first_steps")} | {"outcome": OUTCOME},
        against=("outcome", "random"),
        seeds=(0, 1),
        budget=150_000,
        eval_every=30_000,
    ),
    "branching": Study(
        question="Does AttnRL learn more from as many generated tokens, and is it attention that does it?",
        recipe="recipes/attnrl_tiny.py",
        settings=TREES | DEPENDENCIES,
        arms=CRITERIA | {"oracle": {"branching": "oracle"}, "outcome": OUTCOME},
        against=("outcome", "random"),
        **AT_TOKENS,
    ),
    "length": Study(
        question="Does AttnPO answer shorter than TLMRE and plain outcome RL at equal accuracy?",
        recipe="recipes/attnpo_tiny.py",
        settings=DEPENDENCIES
        | {"compare": False, "max_steps": 50, "gradient_accumulation_steps": 4, "disable_tqdm": True},
        arms={
            "attnpo": {},
            "tlmre": {"attenuate_positive": False, "protect_negative": False},
            "plain": {"attenuate_positive": False, "protect_negative": False, "length_penalty": 0.0},
        },
        against=("tlmre", "plain"),
        eval_every=400_000,
    ),
    "rhythm": Study(
        question="Does credit on preplan and anchor tokens help more than on as many random ones?",
        recipe="recipes/rhythm_tiny.py",
        settings=DEPENDENCIES | {"max_steps": 40},
        arms={name: {"arms": name} for name in SCHEMES},
        against=("random", "none"),
        seed_option="seeds",
        eval_every=300_000,
    ),
    "composition": Study(
        question="Does Rhythm's or AttnPO's credit add to attention's trees?",
        recipe="recipes/attnrl_tiny.py",
        settings=TREES | DEPENDENCIES | CRITERIA["attention"],
        arms={
            "trees": {},
            "trees+random": {"credit": "rhythm", "scheme": "random"},
            "trees+rhythm": {"credit": "rhythm", "scheme": "coupled"},
            "trees+attnpo": ATTNPO | {"heads": "runs/arms/length/attnpo-0/heads/heads.json"},
        },
        against=("trees", "trees+random"),
        **AT_TOKENS,
    ),
}
