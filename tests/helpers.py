"""What the tests share beside fixtures: places, processes of their own, small settings."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest


ROOT = Path(__file__).resolve().parents[1]

# Settings of a trainer that a test looks at: on a CPU in float32, each step logged, nothing saved.
LOOKED_AT = {
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": "none",
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
}


def outside_environment() -> dict[str, str]:
    """The environment without what an engine or an earlier run in this process set for its own ranks."""
    leave_out = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in leave_out}


def launch_script(config: str, script: Path, *arguments: object, timeout: float = 600) -> None:
    """Run a script by `accelerate launch` under one of the project's configurations, and fail with its error output.

    The rendezvous gets a free port, so that launches side by side do not meet.
    """
    environment = outside_environment()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(port), "--config_file"]
    command += [str(ROOT / "accelerate_configs" / f"{config}.yaml"), str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-6000:]


@contextmanager
def refused_in_a_line(capsys, pattern: str) -> Iterator[None]:
    """The process ends with code 2; the last line on stderr, and no other, is a refusal that the pattern matches."""
    with pytest.raises(SystemExit) as end:
        yield
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert [line for line in lines if "Refused" in line] == lines[-1:]
    assert re.search(pattern, lines[-1]), lines[-1]


def logged(trainer, name: str) -> list:
    """Values of a metric in the order in which it was logged."""
    return [entry[name] for entry in trainer.state.log_history if entry.get(name) is not None]


def odd_sum(completions, completion_ids, **kwargs):
    """Right and wrong completions in about equal shares, whatever the model writes."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def always_wrong(completions, **kwargs):
    return [0.0] * len(completions)


def float_array(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def int_array(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def make_rollout(tokens: list[int], reward: float = 0.0, branches=None, **known):
    """A read rollout, or with branches a branched one; what is not given is zero or missing."""
    from attn_trainers.attnrl.exploration import BranchPoints
    from attn_trainers.attnrl.rollouts import BranchedRollout, ReadRollout

    fields = {"sampling_logps": None, "policy": 0, "rewards": float_array(reward), "step_ranges": []}
    fields |= {"old_logps": float_array(*[0.0] * len(tokens)), "tokens": int_array(*tokens), "reward": reward} | known
    if branches is None:
        return ReadRollout(**fields)
    points = BranchPoints(sorted({branch.offset for branch in branches}))
    return BranchedRollout(**fields, branch_points=points, branches=branches)


def make_continuation(offset: int, tokens: list[int], reward: float, sampling_logps=None, policy: int = 1):
    """A scored continuation."""
    from attn_trainers.attnrl.rollouts import Continuation

    return Continuation(
        offset=offset,
        tokens=int_array(*tokens),
        reward=reward,
        rewards=float_array(reward),
        sampling_logps=sampling_logps,
        policy=policy,
    )
