"""A recipe on two nodes, played by two launches on loopback under ZeRO-3, that SIGTERM to one of them stops."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from attn_trainers.base.interruption import SEAL, last_whole_checkpoint
from tests.helpers import ROOT


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_nodes_stop_together_on_sigterm_to_one(environment, tmp_path):
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps({"problem": f"{i} + 1", "answer": str(i + 1)}) + "\n" for i in range(8)))
    arguments = f"--tiny_model --dataset {data} --output_dir {tmp_path / 'run'} --use_vllm false --report_to none "
    arguments += "--num_rollouts 2 --num_branch_points 1 --rollouts_per_branch 1 --max_completion_length 4 "
    arguments += "--per_device_train_batch_size 2 --gradient_accumulation_steps 1 --generation_batch_size 8 "
    arguments += "--save_strategy no --logging_steps 1 --max_steps 10000 --disable_tqdm true"
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", str(ROOT / "accelerate_configs" / "cpu_multinode.yaml")]
    launcher += ["--main_process_port", str(free_port())]
    environment |= {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"}
    logs = [tmp_path / f"node{rank}.log" for rank in range(2)]
    nodes = []
    try:
        for rank, log in enumerate(logs):
            command = [*launcher, "--machine_rank", str(rank), str(ROOT / "recipes" / "attnrl_1p5b.py")]
            with log.open("w") as output:
                nodes.append(
                    subprocess.Popen([*command, *arguments.split()], stdout=output, stderr=output, env=environment)
                )
        deadline = time.monotonic() + 240
        while "step 1  " not in logs[0].read_text():
            assert time.monotonic() < deadline and nodes[0].poll() is None, logs[0].read_text()[-3000:]
            time.sleep(0.5)
        nodes[1].send_signal(signal.SIGTERM)  # the launcher hands it to its own rank only
        assert [node.wait(timeout=120) for node in nodes] == [1, 1]  # what the launchers make of it
    finally:
        for node in nodes:
            for process in [*psutil.Process(node.pid).children(recursive=True), node] if node.poll() is None else []:
                process.kill()
    checkpoint = Path(last_whole_checkpoint(tmp_path / "run"))
    step = int(checkpoint.name.split("-")[1])
    assert f"Stopped by SIGTERM after step {step};" in logs[0].read_text()
    sealed = json.loads((checkpoint / SEAL).read_text())["files"]
    shards = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)]
    names = {name.rpartition("/")[2] for name in sealed}  # DeepSpeed counts the steps that had an update
    assert {*shards, "attnrl_state.json", "rng_state_0.pth", "rng_state_1.pth"} <= names
