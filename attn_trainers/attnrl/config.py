"""Settings of AttnRL."""

import math
from dataclasses import dataclass, field

from ..attention.observers import INFLUENCE_AGGREGATIONS
from ..base.config import MethodConfig
from ..base.options import check_choices, check_least, check_shares
from .exploration import CRITERIA, ROUNDINGS
from .steps import STEP_MODES, StepDelimiters


# Keys of `generation_kwargs` that each request has a value of its own for, or that a continuation cannot honour.
UNUSABLE_GENERATION_KWARGS = {
    "best_of": "each request is one sample",
    "guided_decoding": "a continuation is not a whole completion",
    "logprobs": "the pipeline asks for those of the sampled tokens",
    "max_length": "each request has its own limit: set max_completion_length",
    "max_new_tokens": "each request has its own limit: set max_completion_length",
    "max_tokens": "each request has its own limit: set max_completion_length",
    "n": "each request is one sample: set num_rollouts and rollouts_per_branch",
    "num_return_sequences": "each request is one sample: set num_rollouts and rollouts_per_branch",
    "output_kind": "the pipeline waits for whole completions",
    "prompt_logprobs": "the pipeline asks for those of the sampled tokens",
    "seed": "it would make all samples of a prompt equal: set seed and seeded_sampling",
    "structured_outputs": "a continuation is not a whole completion",
}


@dataclass
class AttnRLConfig(MethodConfig):
    r"""
    Configuration class for [`AttnRLTrainer`].

    Holds the parameters of AttnRL ([Attention as a Compass](https://huggingface.co/papers/2509.26628)); the defaults
    are the published settings. All other parameters are those of [`~trl.GRPOConfig`], of which these have other
    defaults:

    - `num_generations` is derived: the leaf budget of a prompt, `num_rollouts * (1 + num_branch_points *
      rollouts_per_branch)`. A generation batch (`generation_batch_size`) holds that many training rows per prompt at
      most, and is as many updates of `per_device_train_batch_size * ranks * gradient_accumulation_steps` rows as it
      has rows for. By default it is the smallest one of whole prompts that fills an update.
    - `epsilon_high=0.28`, `delta=3.0` (dual clip), `beta=0.001` without bias correction
      (`use_bias_correction_kl=False`), `loss_type="dapo"` (token mean), `lr_scheduler_type="constant"`,
      `max_completion_length=8192`.
    - `vllm_importance_sampling_mode="token_truncate"`: the tokens of a row stem from two policies, so the correction
      is taken token by token.

    Parameters:
        > Parameters that control the tree of a prompt

        num_rollouts (`int`, *optional*, defaults to `6`):
            Initial rollouts per prompt (G).
        num_branch_points (`int`, *optional*, defaults to `2`):
            Branch points of an expanded rollout (N). `0` gives plain outcome RL in the same pipeline.
        rollouts_per_branch (`int`, *optional*, defaults to `2`):
            Continuations sampled at each branch point (T).
        branching (`str`, *optional*, defaults to `"attention"`):
            Where to branch: `"attention"` (steps that later steps attend to), `"entropy"` (tokens of highest entropy,
            as in TreeRL), `"random"` (random steps), `"first_steps"`, or `"oracle"` (steps known to matter,
            by the trainer's `step_truth`).
        branch_top_fraction (`float`, *optional*, defaults to `0.2`):
            Share of the steps, by influence, that are candidates (ρ).
        min_branch_spacing (`int`, *optional*, defaults to `512`):
            Tokens between the end of one branching step and the start of the next, and before the first. `0` recovers
            the paper's text, which has no such rule.
        influence_delta (`int`, *optional*, defaults to `4`):
            Influence of a step counts the attention from steps at least this much later (Δ).

        influence_aggregation (`str`, *optional*, defaults to `"sum"`):
            Influence of a step is the `"sum"` (published) or the `"mean"` of the attention of later steps. The sum
            favours early steps by the number of steps that follow them alone.
        step_mode (`str`, *optional*, defaults to `"paragraphs"`):
            Where steps end: at `"paragraphs"` (published), `"lines"` or `"sentences"`. Answers of a few paragraphs
            have hardly a step that others follow by Δ: branching there is at the first steps whatever attention says.

        > Parameters that control adaptive sampling

        filter_easy_prompts (`bool`, *optional*, defaults to `True`):
            Whether solved prompts of below-average influence are left out before branching (eq. 8).
        expansion (`str`, *optional*, defaults to `"ceil"`):
            How `exp(-z) * num_rollouts`, the number of expanded rollouts at accuracy z, is made whole: `"ceil"` (the
            released runs), `"round"` (the paper, eq. 9), or `"uniform"`: all rollouts are expanded.
        train_unexpanded (`bool`, *optional*, defaults to `False`):
            Whether rollouts without branches are trained on too. They always count in the values.
        success_threshold (`float`, *optional*, defaults to `0.5`):
            A completion counts as correct if its weighted reward is at least this.
        prompt_batch_smoothing (`float`, *optional*, defaults to `0.9`):
            λ of the prompt-batch controller (eq. 10).
        prompt_batch_rounding (`str`, *optional*, defaults to `"round"`):
            `"round"` (the paper) or `"ceil"` (the released runs).
        max_prompt_batch_factor (`float`, *optional*, defaults to `4.0`):
            The controller never draws more than this many times the initial number of prompts.

        > Parameters that control the pipeline

        off_policy (`bool`, *optional*, defaults to `True`):
            One generation call per step: continuations of this batch together with the initial rollouts of the next.
            `False` samples both for the same batch, in two calls.
        overlap_sampling (`bool`, *optional*, defaults to `True`):
            Whether, with a vLLM server and `off_policy=True`, the initial rollouts of the next batch are sampled while
            this one is scored and trained, up to its first optimizer step. Samples of a seeded run stay the same.
        pack_trees (`str`, *optional*, defaults to `"auto"`):
            Whether rows that share prefixes are forwarded as one row that holds each shared token once: `"auto"`
            where the model allows it, `"on"` (refused where it does not) or `"off"`.
        seeded_sampling (`bool`, *optional*, defaults to `False`):
            Whether each request gets a seed of its own, so that a run is repeatable on any number of ranks. With vLLM
            on a GPU it costs sampling speed.
        max_tokens_per_micro_batch (`int`, *optional*):
            Tokens of a micro-batch on one rank, those that rows of a tree share counted once: whole trees are taken,
            or subtrees where one exceeds it. By default a micro-batch is `per_device_train_batch_size` rows.

        > Parameters that control reports

        log_trees (`bool`, *optional*, defaults to `False`):
            Whether each log has a picture of the trees of one prompt of the latest batch, in `output_dir/trees` and in
            trackio, wandb and TensorBoard, those that `report_to` names.
    """

    num_rollouts: int = field(default=6, metadata={"help": "Initial rollouts per prompt (G)."})
    num_branch_points: int = field(
        default=2, metadata={"help": "Branch points per expanded rollout (N). 0 gives plain outcome RL."}
    )
    rollouts_per_branch: int = field(default=2, metadata={"help": "Continuations per branch point (T)."})
    branching: str = field(
        default="attention",
        metadata={"help": "Where to branch: 'attention', 'entropy', 'random', 'first_steps' or 'oracle'."},
    )
    branch_top_fraction: float = field(
        default=0.2, metadata={"help": "Share of the steps, by influence, that are branch candidates (ρ)."}
    )
    min_branch_spacing: int = field(
        default=512, metadata={"help": "Tokens between two branch points, and before the first."}
    )
    influence_delta: int = field(
        default=4, metadata={"help": "Influence counts the attention from steps at least this much later (Δ)."}
    )
    influence_aggregation: str = field(
        default="sum", metadata={"help": "Influence is the 'sum' (published) or the 'mean' over later steps."}
    )
    step_mode: str = field(
        default="paragraphs", metadata={"help": "Steps end at 'paragraphs' (published), 'lines' or 'sentences'."}
    )
    filter_easy_prompts: bool = field(
        default=True, metadata={"help": "Leave out solved prompts of below-average influence before branching."}
    )
    expansion: str = field(
        default="ceil",
        metadata={"help": "Rounding of exp(-z) * num_rollouts: 'ceil', 'round', or 'uniform' to expand all."},
    )
    train_unexpanded: bool = field(default=False, metadata={"help": "Train on rollouts without branches too."})
    success_threshold: float = field(
        default=0.5, metadata={"help": "A completion is correct if its weighted reward is at least this."}
    )
    prompt_batch_smoothing: float = field(default=0.9, metadata={"help": "λ of the prompt-batch controller."})
    prompt_batch_rounding: str = field(
        default="round", metadata={"help": "Rounding of the prompt-batch controller: 'round' or 'ceil'."}
    )
    max_prompt_batch_factor: float = field(
        default=4.0, metadata={"help": "Bound of the prompt batch, in multiples of its initial size."}
    )
    off_policy: bool = field(
        default=True,
        metadata={"help": "Sample this batch's continuations together with the next batch's initial rollouts."},
    )
    overlap_sampling: bool = field(
        default=True, metadata={"help": "With a vLLM server: sample the next batch while this one is trained."}
    )
    pack_trees: str = field(
        default="auto",
        metadata={"help": "Forward shared prefixes once: 'auto' where the model allows it, 'on', 'off'."},
    )
    seeded_sampling: bool = field(
        default=False, metadata={"help": "Give each request a seed of its own (repeatable on any rank count)."}
    )
    max_tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={"help": "Tokens of a micro-batch on one rank, shared ones counted once. Default: by rows."},
    )
    log_trees: bool = field(
        default=False, metadata={"help": "Draw the trees of one prompt at each log; trackers get the picture too."}
    )

    num_generations: int | None = field(
        default=None, metadata={"help": "Derived: the leaf budget of a prompt. Leave unset."}
    )
    num_generations_eval: int | None = field(
        default=1, metadata={"help": "Number of completions per prompt in evaluation."}
    )
    max_completion_length: int | None = field(default=8192, metadata={"help": "Tokens per completion at most."})
    beta: float = field(default=0.001, metadata={"help": "Coefficient of the k3 KL term against the initial model."})
    epsilon_high: float | None = field(default=0.28, metadata={"help": "Upper clip of the importance ratio."})
    delta: float | None = field(default=3.0, metadata={"help": "Dual clip: bound of the ratio for A < 0."})
    use_bias_correction_kl: bool = field(
        default=False, metadata={"help": "Weight the KL term by the importance ratio (the published runs do not)."}
    )
    scale_rewards: str = field(
        default="none", metadata={"help": "'none': tree advantages are not divided by a deviation."}
    )
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning-rate schedule."})
    vllm_importance_sampling_mode: str = field(
        default="token_truncate", metadata={"help": "How the vLLM-to-trainer mismatch is corrected; see GRPOConfig."}
    )

    def __post_init__(self):
        self._check_fields()
        leaf_budget = self.num_rollouts * (1 + self.num_branch_points * self.rollouts_per_branch)
        if self.num_generations not in (None, leaf_budget):
            raise ValueError(
                f"num_generations={self.num_generations} is not the leaf budget of a prompt, num_rollouts * (1 + "
                f"num_branch_points * rollouts_per_branch) = {leaf_budget}. Leave num_generations unset and set those."
            )
        self.num_generations = leaf_budget
        if self.generation_batch_size is None and self.steps_per_generation is None:
            # Micro-batches that hold whole prompts, on any number of ranks.
            whole = leaf_budget // math.gcd(leaf_budget, self.per_device_train_batch_size)
            self.steps_per_generation = whole * -(-self.gradient_accumulation_steps // whole)
        super().__post_init__()
        self.check_per_token_advantages()
        self._check_support()

    def check_saves(self) -> None:
        """Saves fall where they may: they wait for the end of the generation batch."""

    @property
    def prompt_batch(self) -> int:
        """Prompts of a full generation batch."""
        return self.generation_batch_size // self.num_generations

    @property
    def rows_per_update(self) -> int:
        """Rows of an optimizer update over all ranks."""
        return self.per_device_train_batch_size * self.world_size * self.gradient_accumulation_steps

    @property
    def needs_whole_batches(self) -> bool:
        return False  # prompts are drawn one by one, pass after pass

    @property
    def updates_per_batch(self) -> int:
        """Optimizer updates made on a full generation batch."""
        return -(-self.generation_batch_size // self.rows_per_update) * self.num_iterations

    @property
    def reads_influence(self) -> bool:
        """Whether branching or the filter of easy prompts asks for the influence of steps."""
        return self.num_branch_points > 0 and (self.filter_easy_prompts or self._needs == "influence")

    @property
    def reads_entropies(self) -> bool:
        """Whether branching asks for the entropy of tokens."""
        return self._needs == "entropies"

    @property
    def reads_truth(self) -> bool:
        """Whether branching asks which steps matter."""
        return self.num_branch_points > 0 and self._needs == "truth"

    @property
    def _needs(self) -> str | None:
        return CRITERIA[self.branching].needs

    def branching_options(self) -> dict[str, object]:
        """Settings of attention branching, as `report_branching` takes them."""
        return {
            "num_points": self.num_branch_points,
            "top_fraction": self.branch_top_fraction,
            "min_spacing": self.min_branch_spacing,
            "delta": self.influence_delta,
            "step_mode": self.step_mode,
            "aggregation": self.influence_aggregation,
        }

    def preflight(self, model_config, tokenizer, report):
        prompts, ranks = self.prompt_batch, self.world_size
        if prompts < ranks:
            report.warnings.append(
                f"a generation batch has {prompts} prompts for {ranks} ranks: some ranks sample nothing at first; "
                f"raise generation_batch_size to {ranks * self.num_generations} or more."
            )
        if round(prompts * self.max_prompt_batch_factor) == prompts:
            report.warnings.append(
                f"max_prompt_batch_factor={self.max_prompt_batch_factor}: never more than {prompts} prompts come, "
                f"which fill generation_batch_size={self.generation_batch_size} only where each of their "
                f"{self.num_generations} leaves carries signal; raise it, so that prompts without signal are replaced."
            )
        delimiters = StepDelimiters.from_tokenizer(tokenizer, None)
        report.add("blank-line tokens", f"{len(delimiters.paragraph)} (with a newline: {len(delimiters.newline)})")
        if not delimiters.paragraph:
            steps = "single newlines" if delimiters.newline else "every token; branching needs newlines"
            report.warnings.append(f"no token holds a blank line: steps end at {steps}.")

    def _check_fields(self) -> None:
        choices = {"branching": tuple(CRITERIA), "expansion": ROUNDINGS, "prompt_batch_rounding": ("round", "ceil")}
        check_choices(self, choices | {"step_mode": STEP_MODES, "influence_aggregation": INFLUENCE_AGGREGATIONS})
        check_choices(self, {"pack_trees": ("auto", "on", "off")})
        if self.max_tokens_per_micro_batch is not None:
            check_least(self, {"max_tokens_per_micro_batch": 1})
        least = {"num_rollouts": 2, "num_branch_points": 0, "rollouts_per_branch": 1, "min_branch_spacing": 0}
        check_least(self, least | {"influence_delta": 1, "max_prompt_batch_factor": 1.0})
        check_shares(self, ["branch_top_fraction"], positive=True)
        check_shares(self, ["prompt_batch_smoothing"])

    def _check_support(self) -> None:
        self.require(
            {
                "scale_rewards": ("none", "tree advantages are not divided by a deviation"),
                "multi_objective_aggregation": ("sum_then_normalize", "a leaf has one value"),
                "pad_to_multiple_of": (None, "micro-batches are as wide as their longest row"),
                "vllm_structured_outputs_regex": (None, "a continuation is not a whole completion"),
            },
            "AttnRL",
        )
        if self.max_completion_length is None:
            raise ValueError(
                "max_completion_length=None leaves a continuation no limit of its own; set it to a number of tokens."
            )
        for key in self.generation_kwargs or {}:
            if key in UNUSABLE_GENERATION_KWARGS:
                raise ValueError(
                    f"generation_kwargs has {key!r}, but {UNUSABLE_GENERATION_KWARGS[key]}; leave it out."
                )
        if self.gradient_accumulation_steps > self.steps_per_generation:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} exceeds "
                f"steps_per_generation={self.steps_per_generation}: an update would mix generation batches. Set it to "
                f"at most {self.steps_per_generation}, or raise generation_batch_size."
            )
        if self.use_transformers_continuous_batching:
            raise ValueError(
                "use_transformers_continuous_batching=True takes no length limit per request, which branching needs; "
                "set it to False."
            )
