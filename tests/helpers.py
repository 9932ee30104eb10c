"""What the tests share beside fixtures: places, processes of their own, small settings."""

import os
import socket
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]


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
