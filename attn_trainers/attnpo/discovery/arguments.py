"""Settings of a head discovery, and the output folder that belongs to them."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ...base.options import check_choices, check_least
from ...sampling.backends import BACKENDS
from ...sampling.problems import STEP_BY_STEP, parse_template_kwargs
from ...thinking import ANSWERS, EndOfThinking
from ..steps import STEP_MODES, Splitter
from .labels import LikelihoodThresholds
from .ranking import RankingOptions


FREE = (
    ("output_dir", "num_heads", "selection", "average", "criterion", "match_distance", "min_pairs", "held_out")
    + ("batch_size", "intervention_responses")
)  # fmt: skip
"""Settings that a repeated run may change: nothing that is kept in the folder hangs on them."""


@dataclass
class DiscoveryArguments:
    """What to probe, with what, and how heads are chosen."""

    model: str = field(metadata={"help": "Model folder, Hub id or LoRA adapter."})
    data: str = field(
        metadata={
            "help": "JSONL file with, per line: problem, completion and labels ('essential', 'redundant' or null per "
            "step); or problem, answer and completion, to be labelled; or problem and answer, to be solved first."
        }
    )
    output_dir: str = field(default="runs/heads", metadata={"help": "Folder for everything that is found."})
    num_heads: int = field(default=3, metadata={"help": "Heads to choose."})
    selection: str = field(
        default="top_k", metadata={"help": "'top_k' (best single heads) or 'greedy' (best together)."}
    )
    average: str = field(default="macro", metadata={"help": "'macro' weighs responses alike, 'micro' pairs of steps."})
    criterion: str = field(
        default="auto",
        metadata={
            "help": "Pairs of steps that heads are ranked by: 'matched' (close together, both orders alike), 'before' "
            "(the derivation), 'all', or 'auto' (the first of them with pairs enough)."
        },
    )
    match_distance: float = field(
        default=0.2, metadata={"help": "Matched steps are at most this share of the steps apart; neighbours always."}
    )
    min_pairs: int = field(default=50, metadata={"help": "Pairs (of each order) that criterion='auto' demands."})
    essential_share: float = field(
        default=0.25, metadata={"help": "At most this share of a response's steps is labelled essential."}
    )
    min_drop: float = field(
        default=0.05, metadata={"help": "Least loss of the answer without an essential step, nats per answer token."}
    )
    max_change: float = field(
        default=0.01, metadata={"help": "Largest loss of the answer without a redundant step, nats per answer token."}
    )
    intervention_responses: int = field(
        default=20, metadata={"help": "Responses on which attention is masked to check the chosen heads; 0: none."}
    )
    held_out: float = field(
        default=0.3, metadata={"help": "Share of the problems that only measures the chosen heads; 0: none."}
    )
    num_samples: int = field(default=4, metadata={"help": "Completions per problem, where they are generated."})
    min_accuracy: float = field(
        default=0.8, metadata={"help": "Problems solved less often are left out: their responses say less."}
    )
    max_responses: int = field(default=500, metadata={"help": "Responses to label and score at most."})
    prompt_template: str = field(default=STEP_BY_STEP, metadata={"help": "User message with {problem}."})
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Arguments of the chat template as JSON, e.g. '{\"enable_thinking\": false}'."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Of the generation."})
    max_completion_length: int = field(default=16384, metadata={"help": "Tokens per completion at most."})
    backend: str = field(default="auto", metadata={"help": "'vllm', 'transformers' or 'auto'."})
    batch_size: int = field(default=8, metadata={"help": "Sequences per forward."})
    dtype: str = field(default="auto", metadata={"help": "Of the weights."})
    step_mode: str = field(default="phrases", metadata={"help": "'phrases' or 'paragraphs', as in training."})
    phrases_file: str | None = field(default=None, metadata={"help": "JSON file with the phrases that open steps."})
    end_of_thinking: str = field(default="</think>", metadata={"help": "Text that ends the thinking part."})
    answer: str = field(
        default="tag",
        metadata={
            "help": "The answer begins behind the 'tag', or (experimental) is 'last_boxed' or 'last_paragraph'."
        },
    )
    seed: int = field(default=0, metadata={"help": "Of the generation, the split and the bootstrap."})

    def __post_init__(self):
        self.chat_template_kwargs = parse_template_kwargs(self.chat_template_kwargs)
        choices = {
            "selection": ("top_k", "greedy"),
            "step_mode": STEP_MODES,
            "backend": BACKENDS,
            "answer": ANSWERS,
        }
        check_choices(self, choices)
        check_least(self, dict.fromkeys(("num_heads", "num_samples", "max_responses", "batch_size"), 1))
        check_least(self, {"intervention_responses": 0})
        if not 0.0 <= self.held_out < 1.0:
            raise ValueError(f"held_out={self.held_out} must lie in [0, 1): some problems must choose the heads.")
        _ = self.thresholds, self.ranking_options  # they check themselves

    @property
    def splitter(self) -> Splitter:
        return Splitter.of(self.step_mode, self.phrases_file)

    def thinking(self, tokenizer: PreTrainedTokenizerBase) -> EndOfThinking:
        """What ends the thinking, to this tokenizer."""
        return EndOfThinking(tokenizer, self.end_of_thinking)

    @property
    def thresholds(self) -> LikelihoodThresholds:
        return LikelihoodThresholds(self.essential_share, self.min_drop, self.max_change)

    @property
    def ranking_options(self) -> RankingOptions:
        return RankingOptions(self.average, self.criterion, self.match_distance, self.min_pairs)


def check_output(args: DiscoveryArguments) -> Path:
    """The output folder, refused where it holds a discovery with other settings."""
    output = Path(args.output_dir)
    path = output / "settings.json"
    settings = {name: value for name, value in asdict(args).items() if name not in FREE}
    settings["data_digest"] = hashlib.sha256(Path(args.data).read_bytes()).hexdigest()
    if path.exists():
        earlier = json.loads(path.read_text())
        changed = sorted(name for name in settings if settings[name] != earlier.get(name))
        if changed:
            raise ValueError(
                f"output_dir={args.output_dir!r} holds a discovery with other settings ({', '.join(changed)}); choose "
                "another folder, or the settings in its settings.json."
            )
    (output / "scores").mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n")
    return output
