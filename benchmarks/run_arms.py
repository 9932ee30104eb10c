"""Training arms that are compared at an equal budget: run, go on after a kill, report.

    python benchmarks/run_arms.py STUDY [--jobs 2] [--seeds 0 1] [--arms attention random]
    python benchmarks/run_arms.py --report STUDY

`studies.py` is the table of studies. Every arm and seed is a process of its own with one thread; all arms of a seed
run before the next seed. A finished run is a line of `results/STUDY.jsonl`; what is there with the same settings is
not run again, so that the driver may be killed at any time and started again: it then repeats the runs that were cut
off. Curves, logs and models of the runs are in `runs/arms/STUDY`. `--report` writes `results/STUDY.md` and `.png` from
the lines alone; a study that was run reports by itself.
"""

import argparse
import ast
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from arm_report import Records, write_report
from studies import STUDIES, Study
from tqdm.auto import tqdm

from attn_trainers.jsonl import append_jsonl, read_jsonl


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "trl")
# Of a run: one thread, on whichever core is free; vLLM would bind all runs to the same one.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
ENVIRONMENT |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
POLL_SECONDS = 0.5
SETTINGS = ("ARMS", "DEPENDENCIES")  # tables of a recipe


@dataclass
class Job:
    """A run on its way.

    Attributes:
        arm, seed: which.
        process: it, the leader of a group of its own.
        folder: its output, with its log beside.
        start: when it began.
    """

    arm: str
    seed: int
    process: subprocess.Popen
    folder: Path
    start: float

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    def curve(self) -> list[dict]:
        """Points so far."""
        files = sorted(self.folder.glob("curve*.jsonl"))
        whole = (
            [line for line in files[0].read_text().splitlines(keepends=True) if line.endswith("\n")] if files else []
        )
        return [json.loads(line) for line in whole]


def recipe_settings(path: Path) -> str:
    """A recipe's own settings as code without comments: its dataclasses, and what a task changes in them."""
    settings = [
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) or (isinstance(node, ast.Assign) and node.targets[0].id in SETTINGS)
    ]
    return "\n".join(map(ast.unparse, settings))


def settings_hash(study: Study, arm: str) -> str:
    """Name of everything that a run of the arm is told, by its command line or by its recipe, except its seed."""
    told = json.dumps([study.recipe, recipe_settings(ROOT / study.recipe), study.options(arm)], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def command(study: Study, arm: str, seed: int, folder: Path) -> list[str]:
    """Command line of a run."""
    options = study.options(arm) | {study.seed_option: seed, "output_dir": folder}
    parts = [sys.executable, str(ROOT / study.recipe)]
    return parts + [part for name, value in options.items() for part in (f"--{name}", str(value))]


def finished(study: Study, lines: list[dict]) -> tuple[Records, int]:
    """Runs of the study by arm and seed, and the number of lines with settings that it no longer has."""
    records: Records = {arm: {} for arm in study.arms}
    stale = 0
    for line in lines:
        if line["arm"] in study.arms and line["settings"] == settings_hash(study, line["arm"]):
            records[line["arm"]].setdefault(line["seed"], line)
        else:
            stale += 1
    return {arm: runs for arm, runs in records.items() if runs}, stale


def planned(study: Study, records: Records) -> Records:
    """Of the runs, those with seeds of the study: what counts."""
    kept = {arm: {seed: runs[seed] for seed in study.seeds if seed in runs} for arm, runs in records.items()}
    return {arm: runs for arm, runs in kept.items() if runs}


def to_do(study: Study, records: Records, arms: list[str], seeds: list[int]) -> list[tuple[str, int]]:
    """Runs that are missing, all arms of a seed first: a study that is cut off still compares."""
    return [(arm, seed) for seed in seeds for arm in arms if seed not in records.get(arm, {})]


def versions() -> dict[str, str]:
    """Of the packages that decide the numbers, and the commit."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {name: version(name) for name in PACKAGES} | {"commit": commit or "unknown"}


def result_line(study: Study, job: Job, seconds: float) -> dict:
    """What is kept of a finished run.

    Raises:
        ValueError: if it left no curve with a point before and one after training.
    """
    curve = job.curve()
    if len(curve) < 2:
        raise ValueError(f"{job.folder} has a curve of {len(curve)} points, not one before and one after training.")
    last = curve[-1]
    measured = ("accuracy", "standard_error", "mean_length", "mean_thinking", "generated_tokens", "updates", "seconds")
    return {
        "arm": job.arm,
        "seed": job.seed,
        **{name: last[name] for name in measured},
        "process_seconds": round(seconds, 1),
        "settings": settings_hash(study, job.arm),
        "versions": versions(),
        "curve": curve,
    }


class Driver:
    """Runs what a study lacks, `jobs` processes at a time.

    Args:
        name: of the study, whose runs lie in `runs/arms/<name>`.
        study: the study.
        lines: file of finished runs.
        jobs: processes at a time.
    """

    def __init__(self, name: str, study: Study, lines: Path, jobs: int):
        self.name, self.study, self.lines, self.jobs = name, study, lines, jobs
        self.folder = ROOT / "runs" / "arms" / name
        self.running: list[Job] = []
        self.failed: list[Job] = []

    def run(self, waiting: list[tuple[str, int]]) -> None:
        """Run all; stopping the driver stops its runs.

        Raises:
            SystemExit: where the study is being run already, by another driver or by the runs that one left behind
                that was killed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise SystemExit(
                    f"Refused: study={self.name!r} is being run, by another driver or by the last runs of one that "
                    "was killed; wait for its end, or stop it."
                ) from None
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
            try:
                self._run(list(waiting), lock.fileno())
            finally:
                for job in self.running:
                    os.killpg(job.process.pid, signal.SIGKILL)

    def _run(self, waiting: list[tuple[str, int]], lock: int) -> None:
        with tqdm(total=len(waiting), desc=self.name, unit="run") as progress:
            while waiting or self.running:
                while waiting and len(self.running) < self.jobs:
                    self.running.append(self._start(*waiting.pop(0), lock))
                time.sleep(POLL_SECONDS)
                for job in [job for job in self.running if job.process.poll() is not None]:
                    self.running.remove(job)
                    self._finish(job)
                    progress.update()
                progress.set_postfix_str(", ".join(map(self._shown, self.running)))

    def _start(self, arm: str, seed: int, lock: int) -> Job:
        folder = self.folder / f"{arm}-{seed}"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off
        with socket.create_server(("localhost", 0)) as free:  # runs would take the same default port for their engines
            environment = os.environ | ENVIRONMENT | {"MASTER_PORT": str(free.getsockname()[1])}
        with folder.with_suffix(".log").open("w") as log:
            process = subprocess.Popen(
                command(self.study, arm, seed, folder),
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
                pass_fds=[lock],  # a run that outlives its driver keeps the study locked
            )
        return Job(arm, seed, process, folder, time.monotonic())

    def _finish(self, job: Job) -> None:
        code = job.process.returncode
        if code == 0:
            append_jsonl(self.lines, result_line(self.study, job, time.monotonic() - job.start))
        else:
            self.failed.append(job)
            tail = "\n".join(job.log.read_text(errors="replace").splitlines()[-5:])
            tqdm.write(f"{job.arm}, seed {job.seed} ended with status {code}; {job.log}:\n{tail}")

    def _shown(self, job: Job) -> str:
        curve = job.curve()
        if not curve:
            return f"{job.arm}-{job.seed}: starts"
        tokens, accuracy = curve[-1]["generated_tokens"], curve[-1]["accuracy"]
        share = f"{tokens / self.study.budget:.0%}" if self.study.budget else f"{tokens:,} tokens"
        return f"{job.arm}-{job.seed}: {share}, {100 * accuracy:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=list(STUDIES), nargs="?")
    parser.add_argument("--report", choices=list(STUDIES), metavar="STUDY", help="tables and picture alone")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, one core each")
    parser.add_argument("--arms", nargs="+", help="of the study; default all")
    parser.add_argument("--seeds", nargs="+", type=int, help="of the study; default all")
    args = parser.parse_args()
    name = args.report or args.study
    if name is None:
        parser.error(f"name a study: {', '.join(STUDIES)}")
    study = STUDIES[name]
    unknown = [arm for arm in args.arms or [] if arm not in study.arms]
    if unknown:
        parser.error(f"--arms {' '.join(unknown)}: unknown; choose from {', '.join(study.arms)}")
    RESULTS.mkdir(exist_ok=True)
    lines = RESULTS / f"{name}.jsonl"
    driver = Driver(name, study, lines, max(1, args.jobs))
    records, stale = finished(study, read_jsonl(lines, repair=True))
    if stale:
        print(f"{stale} lines of {lines.name} have settings that the study no longer has; they are passed over.")
    if not args.report:
        driver.run(to_do(study, records, args.arms or list(study.arms), args.seeds or list(study.seeds)))
        records, _ = finished(study, read_jsonl(lines, repair=True))
    counted = planned(study, records)
    print(write_report(name, study, counted, RESULTS) if counted else f"No run of {name} is finished.")
    if driver.failed:
        raise SystemExit(f"{len(driver.failed)} runs failed; their logs are in {driver.folder}.")


if __name__ == "__main__":
    main()
