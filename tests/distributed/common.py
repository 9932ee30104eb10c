"""What the scripts share that the tests launch on one or two ranks; their folder is on the path when they run."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState


# A step linear in the gradient, so that equal gradients give equal weights; everything that takes time switched off.
SETTINGS = {
    "gradient_accumulation_steps": 2,
    "optim": "sgd",
    "weight_decay": 0.0,
    "vllm_max_model_length": 128,
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": "none",
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
}
if "TEST_SERVER_URL" in os.environ:
    SETTINGS |= {"vllm_mode": "server", "vllm_server_base_url": os.environ["TEST_SERVER_URL"]}


def odd_sum(completions, completion_ids, **kwargs) -> list[float]:
    """Right and wrong completions in about equal shares, whatever the model writes."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def train_and_save(trainer, output: str, num_ranks: int) -> None:
    """Train on as many ranks as were asked for, and save the model beside the output file."""
    trainer.train()
    assert trainer.accelerator.num_processes == num_ranks
    trainer.save_model(str(Path(output).with_suffix("")))


def history(trainer, *prefixes: str) -> list[dict]:
    """What was logged of each step: losses, rewards and the methods' metrics, times left out."""
    kept = ("loss", "grad_norm", "reward", "sampling/sampling_logp_difference/mean")
    return [
        {
            name: value
            for name, value in entry.items()
            if name in kept or (name.startswith(prefixes) and "seconds" not in name)
        }
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def run(main: Callable[..., None]) -> None:
    """Call a script's `main(model_dir, output, num_ranks, use_vllm, *more)` with the command line's values."""
    model_dir, output, num_ranks, generation, *more = sys.argv[1:]
    main(model_dir, output, int(num_ranks), generation == "vllm", *more)
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
    # DeepSpeed and gloo leave threads running, which now and then abort a rank while its interpreter is torn down,
    # after all it had to do is done: so it ends without that.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
