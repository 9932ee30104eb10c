"""What attention branching has to choose from in a sample of completions, told before a run."""

from pathlib import Path

import torch

from ..attention import forward_context_influence
from ..attnrl.branching_report import BranchingReport, report_branching
from ..attnrl.config import AttnRLConfig
from ..attnrl.steps import StepDelimiters, segment_steps
from ..jsonl import read_jsonl
from ..sampling.models import load_model, load_tokenizer
from ..sampling.problems import prompt_token_ids


def sample_report(args: AttnRLConfig, model_name: str, source: str, template: str) -> BranchingReport:
    """Read the influence of the steps of given completions and branch them as the run would.

    Args:
        args: settings of the run.
        model_name: folder or Hub id of the model, which is loaded in its saved type.
        source: file of JSON lines with `problem` and `completion`.
        template: user message with `{problem}`.

    Raises:
        ValueError: for a missing file, a line without problem or completion, or no line at all.
    """
    if not Path(source).is_file():
        raise ValueError(f"branching_sample={source!r} does not exist; give a file of JSON lines.")
    records = read_jsonl(source)
    if not records or not all(record.get("problem") and record.get("completion") for record in records):
        raise ValueError(
            f"branching_sample={source!r} has a line without 'problem' or 'completion', or none; give completions of "
            "the model."
        )
    tokenizer = load_tokenizer(model_name)
    model = load_model(model_name, "auto").to("cuda" if torch.cuda.is_available() else "cpu")
    delimiters = StepDelimiters.from_tokenizer(tokenizer, args.end_of_thinking, args.step_mode)
    steps, influences = [], []
    for record in records:
        prompt = prompt_token_ids(tokenizer, record["problem"], template, args.chat_template_kwargs)
        completion = tokenizer(record["completion"], add_special_tokens=False)["input_ids"]
        segmentation = segment_steps(len(prompt), completion, delimiters)
        ids = torch.tensor([prompt + completion], device=model.device)
        (influence,) = forward_context_influence(
            model,
            ids,
            torch.ones_like(ids),
            [segmentation.ranges],
            [segmentation.stop_step],
            delta=args.influence_delta,
            aggregation=args.influence_aggregation,
        )
        steps.append([(start - len(prompt), end - len(prompt)) for start, end in segmentation.ranges[1:]])
        influences.append(influence[1:].float().cpu().numpy())
    return report_branching(steps, influences, **args.branching_options())
