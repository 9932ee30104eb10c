"""A vLLM server on loopback, for tests that need the real one."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import requests

from tests.helpers import outside_environment


class RealServer:
    """Starts vLLM's server of a model in a process group of its own; `kill` ends it without a goodbye.

    Args:
        model: folder of the model.
        log: file for what it prints.
        lora_rank: of the largest adapter that it takes; without it, none.
    """

    def __init__(self, model: Path, log: Path, lora_rank: int | None = None):
        self.model, self.log, self.lora_rank = model, log, lora_rank
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start it, without waiting."""
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--max-model-len", "128"]
        command += ["--enforce-eager", "--logprobs-mode", "processed_logprobs"]
        environment = outside_environment() | {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        if self.lora_rank is not None:
            command += ["--enable-lora", "--max-lora-rank", str(self.lora_rank)]
            environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def wait(self, seconds: float = 300.0) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + seconds
        while True:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, f"no answer within {seconds} s"
            try:
                if requests.get(f"{self.url}/health", timeout=1).ok:
                    return
            except requests.RequestException:
                time.sleep(0.5)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
