"""What a user sets of AttnPO's credit, whatever trainer it runs in."""

import json
from dataclasses import dataclass, field

from ..base.options import check_choices, check_shares
from ..thinking import check_answer
from .steps import STEP_MODES


@dataclass
class AttnPOOptions:
    r"""
    Settings of AttnPO's credit ([Attention-Guided Process Supervision for Efficient
    Reasoning](https://huggingface.co/papers/2602.09953)); the defaults are the published ones.

    Parameters:
        > Parameters that control the steps of a response

        heads (`list[list[int]]` or `str`, *optional*):
            Key-focus heads, pairs `[layer, head]` from 0; or the path of a heads file, as
            `attn-trainers heads` writes it; or the name of a model whose heads are known. Default: the
            known heads of the model that is trained.
        step_mode (`str`, *optional*, defaults to `"phrases"`):
            `"phrases"` cuts the thinking at reasoning phrases, `"paragraphs"` at blank lines.
        phrases_file (`str`, *optional*):
            JSON file with the phrases of another language or model family: lists `turn`, `forward`, `summary` and
            optionally `final` and `whole_words`. Default: the English set.
        min_step_chars (`int`, *optional*, defaults to `80`):
            Steps with fewer characters are merged into a neighbour.
        min_rest_chars (`int`, *optional*, defaults to `15`):
            A short summary with at most this many characters after its phrase belongs to what follows.
        compat_steps (`bool`, *optional*, defaults to `False`):
            Whether to cut exactly as the published program does, faults included.
        end_of_thinking (`str`, *optional*, defaults to `"</think>"`):
            Text that ends the thinking part.

        answer (`str`, *optional*, defaults to `"tag"`):
            Where the final answer begins: behind the end of thinking (`"tag"`) or, experimental, for models that write
            no tags, with the last `\boxed{}` (`"last_boxed"`) or the last paragraph (`"last_paragraph"`).

        > Parameters that control reward and credit

        accuracy_reward (`str`, *optional*):
            Name of the reward function that says whether a response is correct, 1 or 0. Default: the first.
        length_penalty (`float`, *optional*, defaults to `0.2`):
            Weight of the length in the reward of a correct response.
        attenuate_positive (`bool`, *optional*, defaults to `True`):
            Whether redundant steps of correct responses with a positive advantage lose credit.
        protect_negative (`bool`, *optional*, defaults to `True`):
            Whether essential steps of correct responses with a negative advantage are spared it. With both switches
            off the run is TLMRE: leave-one-out advantages of length-penalised rewards.
        baseline_power (`float`, *optional*, defaults to `2.0`):
            Exponent of the prompt's accuracy in the score below which a step counts as redundant.
        attenuation_power (`float`, *optional*, defaults to `2.0`):
            Exponent of the prompt's accuracy in the strength of the attenuation.
        attenuation_floor (`float`, *optional*, defaults to `0.0`):
            Least factor of an attenuated step.
        baseline_length (`str`, *optional*, defaults to `"sequence"`):
            Length that the uniform level of attention refers to: `"sequence"` (prompt and response, the published
            program) or `"response"` (the paper's symbol).
        schedule_fraction (`float`, *optional*, defaults to `1.0`):
            Share of the training steps over which attenuation is opened from easy to hard prompts: a prompt of
            accuracy p is attenuated once more than the share 1 - p of them is done. Published: 1000 steps. `0` opens
            it at once.

        > Parameters that control reports

        page_steps (`int`, *optional*, defaults to `0`):
            Every this many steps, an HTML page of one response with its steps, scores and factors is written to
            `output_dir/attnpo`. `0` writes none.

    Raises:
        ValueError: for a field outside its range, naming field, value and fix.
    """

    heads: list[list[int]] | str | None = field(
        default=None,
        metadata={"help": "Key-focus heads: [[layer, head], ...], a heads file, or a known model's name."},
    )
    step_mode: str = field(
        default="phrases", metadata={"help": "Cut the thinking at 'phrases' or at blank lines ('paragraphs')."}
    )
    phrases_file: str | None = field(default=None, metadata={"help": "JSON file with the phrases that open steps."})
    min_step_chars: int = field(default=80, metadata={"help": "Steps with fewer characters are merged."})
    min_rest_chars: int = field(
        default=15, metadata={"help": "Characters after its phrase up to which a short summary joins what follows."}
    )
    compat_steps: bool = field(default=False, metadata={"help": "Cut exactly as the published program does."})
    end_of_thinking: str = field(default="</think>", metadata={"help": "Text that ends the thinking part."})
    answer: str = field(
        default="tag",
        metadata={
            "help": "The final answer begins behind the 'tag', or (experimental) is 'last_boxed' or 'last_paragraph'."
        },
    )
    accuracy_reward: str | None = field(
        default=None, metadata={"help": "Name of the reward function that is the correctness. Default: the first."}
    )
    length_penalty: float = field(default=0.2, metadata={"help": "Weight of the length in a correct reward."})
    attenuate_positive: bool = field(
        default=True, metadata={"help": "Attenuate redundant steps of correct responses with a positive advantage."}
    )
    protect_negative: bool = field(
        default=True, metadata={"help": "Spare essential steps of correct responses with a negative advantage."}
    )
    baseline_power: float = field(default=2.0, metadata={"help": "Exponent of the accuracy in the baseline score."})
    attenuation_power: float = field(
        default=2.0, metadata={"help": "Exponent of the accuracy in the strength of the attenuation."}
    )
    attenuation_floor: float = field(default=0.0, metadata={"help": "Least factor of an attenuated step."})
    baseline_length: str = field(
        default="sequence", metadata={"help": "Length in the baseline score: 'sequence' or 'response'."}
    )
    schedule_fraction: float = field(
        default=1.0, metadata={"help": "Share of training over which attenuation opens. 0 opens it at once."}
    )
    page_steps: int = field(default=0, metadata={"help": "Steps between two pages of a response; 0: no pages."})

    def __post_init__(self):
        if isinstance(self.heads, str) and self.heads.lstrip().startswith("["):
            self.heads = _pairs_from_text(self.heads)
        check_answer(self.answer)
        check_choices(self, {"step_mode": STEP_MODES, "baseline_length": ("sequence", "response")})
        check_shares(self, ["length_penalty", "attenuation_floor", "schedule_fraction"])
        for name in ("baseline_power", "attenuation_power", "min_step_chars", "min_rest_chars", "page_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative; 0 switches it off.")
        if not self.end_of_thinking:
            raise ValueError(
                f"end_of_thinking={self.end_of_thinking!r} is empty; set it to the text that ends thinking."
            )
        if self.phrases_file is not None and (self.compat_steps or self.step_mode != "phrases"):
            raise ValueError(
                f"phrases_file={self.phrases_file!r} is not read with step_mode={self.step_mode!r} and "
                f"compat_steps={self.compat_steps}; unset it, or set step_mode='phrases' and compat_steps=False."
            )

    @property
    def scales_credit(self) -> bool:
        """Whether any step may be scaled; without, no attention is read."""
        return self.attenuate_positive or self.protect_negative


def _pairs_from_text(text: str) -> list[list[int]]:
    """Heads given as text on the command line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"heads={text!r} is no list of pairs ({error.msg}); write [[layer, head], ...] without spaces."
        ) from error
