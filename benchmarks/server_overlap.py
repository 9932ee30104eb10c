r"""Step time of AttnRL with a vLLM server, with and without sampling beside training.

    python benchmarks/server_overlap.py --model MODEL --data problems.jsonl --url http://127.0.0.1:8000

The server (docs/multi_node.md) serves MODEL. Both runs start from it, with the same seeds, and so with the same
samples. The table tells the seconds of a generation batch, those that the trainer waited for samples, and the share of
the sampling of new rollouts that was hidden behind scoring and training; the first batch of a run warms up and is left
out.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset

from attn_trainers import AttnRLConfig, AttnRLTrainer
from attn_trainers.sampling.models import load_tokenizer
from attn_trainers.tables import markdown_table


def odd_sum(completions, completion_ids, **kwargs) -> list[float]:
    """Right and wrong in about equal shares, so that every batch has rows whatever the model can."""
    return [float(sum(ids) % 2) for ids in completion_ids]


class TimedTrainer(AttnRLTrainer):
    """Notes when each generation batch starts."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.starts: list[float] = []

    def _next_training_batch(self):
        self.starts.append(time.perf_counter())
        return super()._next_training_batch()


def measure(options: argparse.Namespace, overlaps: bool) -> dict[str, float]:
    """Means over the generation batches of one run."""
    lines = Path(options.data).read_text().splitlines()[:64]
    examples = [json.loads(line) for line in lines]
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": e["problem"]}],
            }
            for e in examples
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        args = AttnRLConfig(
            folder,
            num_rollouts=4,
            num_branch_points=1,
            rollouts_per_branch=2,
            min_branch_spacing=8,
            influence_delta=1,
            expansion="uniform",
            filter_easy_prompts=False,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=6,
            max_completion_length=options.max_tokens,
            max_steps=options.batches,
            learning_rate=1e-6,
            seeded_sampling=True,
            use_vllm=True,
            vllm_mode="server",
            vllm_server_base_url=options.url,
            overlap_sampling=overlaps,
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            bf16=torch.cuda.is_available(),
        )
        trainer = TimedTrainer(
            options.model,
            odd_sum,
            args,
            train_dataset=data,
            processing_class=load_tokenizer(options.model),
        )
        trainer.train()
        end = time.perf_counter()
    logged = {
        name: [entry[name] for entry in trainer.state.log_history if entry.get(name) is not None][1:]
        for name in ("attnrl/seconds/generate", "attnrl/seconds/waited", "attnrl/seconds/ahead")
    }
    mean = {name.split("/")[-1]: sum(values) / len(values) for name, values in logged.items() if values}
    # The last batch samples nothing ahead.
    starts = trainer.starts
    mean["batch"] = (starts[-1] - starts[1]) / (len(starts) - 2) if len(starts) > 2 else end - starts[0]
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="JSONL with problem and answer")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--batches", type=int, default=6, help="optimizer steps, about a generation batch each")
    parser.add_argument("--max_tokens", type=int, default=128)
    options = parser.parse_args()
    rows = []
    for overlaps in (False, True):
        seen = measure(options, overlaps)
        waited = seen["generate"] + seen.get("waited", 0.0)
        hidden = f"{1 - seen['waited'] / seen['ahead']:.0%}" if overlaps else "-"
        rows.append(["on" if overlaps else "off", f"{seen['batch']:.2f}", f"{waited:.2f}", hidden])
    print(markdown_table(["overlap", "s per batch", "s waited for samples", "new rollouts' sampling hidden"], rows))


if __name__ == "__main__":
    main()
