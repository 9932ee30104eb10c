"""The settings of the branching probe; those that a training run has too are called as in `AttnRLConfig`."""

from dataclasses import dataclass, field, fields

from ..attention.observers import INFLUENCE_AGGREGATIONS
from ..attnrl.config import AttnRLConfig
from ..attnrl.exploration import CRITERIA
from ..attnrl.steps import STEP_MODES
from ..base.options import check_choices, check_least, check_shares, require_choice
from ..sampling.backends import BACKENDS
from ..sampling.problems import STEP_BY_STEP, parse_template_kwargs
from ..sampling.requests import SamplingSettings


# What the probe can hand to a criterion (`Criterion.needs`).
SIGNALS = (None, "influence", "entropies", "rng")


def as_in_training(name: str):
    """The field of a training run's settings: its default and help."""
    trained = AttnRLConfig.__dataclass_fields__[name]
    return field(default=trained.default, metadata=trained.metadata)


@dataclass
class BranchingArguments:
    """What is probed, and how."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id of a model or a LoRA adapter."})
    data: str | None = field(
        default=None, metadata={"help": "File (JSONL, JSON, Parquet, CSV) or Hub data set of problems and answers."}
    )
    output_dir: str = field(default="runs/branching", metadata={"help": "Where tables, picture and JSON go."})
    num_problems: int = field(default=64, metadata={"help": "Problems, from the first on."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub data set."})
    problem_column: str = field(default="problem", metadata={"help": "Column of the problem texts."})
    answer_column: str = field(default="answer", metadata={"help": "Column of the answers."})
    prompt_template: str = field(
        default=STEP_BY_STEP, metadata={"help": "User message; {problem} stands for the problem."}
    )
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Arguments of the chat template as JSON, e.g. '{\"enable_thinking\": false}'."}
    )
    criteria: list[str] = field(
        default_factory=lambda: [name for name, criterion in CRITERIA.items() if criterion.needs in SIGNALS],
        metadata={"help": "Branching criteria that are compared."},
    )
    num_rollouts: int = field(default=4, metadata={"help": "Initial rollouts per prompt (G; 6 in training)."})
    num_branch_points: int = field(default=2, metadata={"help": "Branch points per rollout (N)."})
    rollouts_per_branch: int = as_in_training("rollouts_per_branch")
    branch_top_fraction: float = field(default=0.2, metadata={"help": "Share of the steps that are candidates (ρ)."})
    min_branch_spacing: int = as_in_training("min_branch_spacing")
    influence_delta: int = as_in_training("influence_delta")
    influence_aggregation: str = as_in_training("influence_aggregation")
    step_mode: str = as_in_training("step_mode")
    end_of_thinking: str = as_in_training("end_of_thinking")
    max_completion_length: int = as_in_training("max_completion_length")
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature, above 0."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling threshold."})
    seed: int = field(default=0, metadata={"help": "Of sampling, random steps and the bootstrap."})
    disrupt: bool = field(
        default=False, metadata={"help": "Corrupt the numbers of single steps of right rollouts and let them go on."}
    )
    disrupt_steps: int = field(default=6, metadata={"help": "Steps that are corrupted per right rollout at most."})
    backend: str = field(default="auto", metadata={"help": "vllm, transformers, or auto (vllm where installed)."})
    dtype: str = field(default="auto", metadata={"help": "auto (as saved), float32, bfloat16 or float16."})
    batch_size: int = field(default=16, metadata={"help": "Completions per batch (transformers only)."})
    gpu_memory_utilization: float = field(
        default=0.6, metadata={"help": "Share of GPU memory that vLLM takes; the attention is read beside it."}
    )
    tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that vLLM spreads the model over."})

    def __post_init__(self):
        self.chat_template_kwargs = parse_template_kwargs(self.chat_template_kwargs)
        if not self.model or not self.data:
            raise ValueError(f"model={self.model!r} and data={self.data!r}: set both.")
        choices = {"step_mode": STEP_MODES, "influence_aggregation": INFLUENCE_AGGREGATIONS, "backend": BACKENDS}
        check_choices(self, choices)
        for name in self.criteria:
            require_choice("criteria", name, tuple(CRITERIA))
            if CRITERIA[name].needs not in SIGNALS:
                raise ValueError(
                    f"criteria={name!r} needs {CRITERIA[name].needs}, which no model or file tells; leave it out."
                )
        if not self.criteria or len(set(self.criteria)) < len(self.criteria):
            raise ValueError(f"criteria={self.criteria} is empty or has one twice; name each once.")
        counts = ("num_problems", "num_rollouts", "num_branch_points", "rollouts_per_branch", "influence_delta")
        check_least(self, dict.fromkeys((*counts, "max_completion_length", "disrupt_steps", "batch_size"), 1))
        check_least(self, {"min_branch_spacing": 0})
        check_shares(self, ["branch_top_fraction", "top_p", "gpu_memory_utilization"], positive=True)
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} makes all continuations alike; set it above 0.")
        if "{problem}" not in self.prompt_template:
            raise ValueError(f"prompt_template={self.prompt_template!r} has no {{problem}}; add it where it goes.")

    @property
    def sampling(self) -> SamplingSettings:
        return SamplingSettings(**{f.name: getattr(self, f.name) for f in fields(SamplingSettings)})

    @property
    def sampling_facts(self) -> dict[str, object]:
        """Of the sampling settings, those that change what is drawn."""
        return {name: getattr(self, name) for name in ("temperature", "top_p", "dtype")}
