"""The run over all checks: each in a process of its own with a limit, a table, JSON that a later run goes on with."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
import trl
from tqdm.auto import tqdm

from ..launch.preflight import load_model_config
from ..tables import markdown_table
from .registry import Check, Context, load_checks


CHECKS = load_checks()
OUT_OF_BUDGET = "the budget of minutes is used; the same command goes on from here"
SMOKE_SECONDS = 600  # limit of a check on a CPU, which may be busy
HEADER = ("check", "what", "measured", "goal", "result", "seconds")


@dataclass
class GpuCheckArguments:
    """What to check, and where to put the result."""

    model: str | None = field(
        default=None, metadata={"help": "Folder of a model. Default: random weights of a 1.5B's shape."}
    )
    output: str = field(default="runs/gpu_check", metadata={"help": "Folder of results.json, results.md and logs."})
    only: list[str] = field(default_factory=list, metadata={"help": f"Checks to run, of: {', '.join(CHECKS)}."})
    smoke: bool = field(
        default=False, metadata={"help": "Tiny shapes, on a CPU too; what needs CUDA is skipped by name."}
    )
    rerun: bool = field(default=False, metadata={"help": "Run checks again that results.json has."})
    budget_minutes: float = field(default=25.0, metadata={"help": "Checks that do not fit are left for the next run."})

    def __post_init__(self):
        unknown = [name for name in self.only if name not in CHECKS]
        if unknown:
            raise ValueError(f"only={unknown} names no check; choose of {', '.join(CHECKS)}.")


def run(args: GpuCheckArguments) -> None:
    """Run the checks, print the table and leave it in the output folder.

    Raises:
        ValueError: without a GPU and without `smoke`, or for a model that cannot be read.
        SystemExit: with code 1 if a check failed.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.smoke:
        raise ValueError("smoke=False needs a CUDA device, and there is none; give --smoke to try it on a CPU.")
    if args.model:
        load_model_config(args.model)
    folder = Path(args.output)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    where = {"device": device_name(), "smoke": args.smoke, "model": args.model}
    records = read_records(folder / "results.json", where)
    chosen = [check for name, check in CHECKS.items() if not args.only or name in args.only]
    start = time.monotonic()
    progress = tqdm(chosen, desc="GPU check", unit="check")
    for check in progress:
        progress.set_postfix_str(check.name)
        if not args.rerun and records.get(check.name, {}).get("status") in ("pass", "measured"):
            continue
        left = 60 * args.budget_minutes - (time.monotonic() - start)
        context = Context(device, args.smoke, folder, args.model, steps_before(records))
        record = run_check(check, context, left)
        if record["reason"] != OUT_OF_BUDGET or check.name not in records:  # else what is known of it stays
            records[check.name] = record
        write_results(folder, where, records)
    shutil.rmtree(folder / "models", ignore_errors=True)
    shutil.rmtree(folder / "runs", ignore_errors=True)
    print((folder / "results.md").read_text())
    if any(records[check.name]["status"] == "fail" for check in chosen):
        raise SystemExit(1)


def device_name() -> str:
    """The GPU's name, or that there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def read_records(path: Path, where: dict) -> dict[str, dict]:
    """Records of an earlier run on the same device, of the same model and shapes; none of another."""
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text())
    return earlier["checks"] if earlier["where"] == where else {}


def steps_before(records: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Findings of the trainers' steps that were made, by check and what was measured."""
    return {
        name: {one["what"]: one["measured"] for one in record["findings"]}
        for name, record in records.items()
        if name.startswith("step_") and record.get("findings")
    }


def run_check(check: Check, context: Context, seconds_left: float) -> dict:
    """The record of one check: status, findings or reason, seconds."""
    limit = SMOKE_SECONDS if context.smoke else check.seconds
    reason = reason_to_skip(check, context, seconds_left, limit)
    if reason:
        return {"status": "skipped", "reason": reason, "findings": [], "seconds": 0.0}
    start = time.monotonic()
    result = run_worker(check, context, limit)
    seconds = round(time.monotonic() - start, 1)
    if "skipped" in result:
        return {"status": "skipped", "reason": result["skipped"], "findings": [], "seconds": seconds}
    if "error" in result:
        return {"status": "fail", "reason": result["error"], "findings": [], "seconds": seconds}
    statuses = {finding["status"] for finding in result["findings"]}
    status = next((one for one in ("fail", "pass") if one in statuses), "measured")
    return {"status": status, "reason": "", "findings": result["findings"], "seconds": seconds}


def reason_to_skip(check: Check, context: Context, seconds_left: float, limit: float) -> str:
    """Why a check is not run, empty if it is."""
    if check.needs_cuda and context.device != "cuda":
        return f"needs CUDA: {check.needs_cuda}"
    if context.smoke and not check.in_smoke:
        return "left out of --smoke: like the others of its kind on a CPU"
    if seconds_left < limit and not context.smoke:
        return OUT_OF_BUDGET
    return ""


def run_worker(check: Check, context: Context, limit: float) -> dict:
    """Findings of a check made by a process of its own, which is ended after `limit` seconds."""
    result, log = context.folder / "logs" / f"{check.name}.json", context.folder / "logs" / f"{check.name}.log"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "attn_trainers.gpu_check.worker", check.name, context.to_json(), str(result)]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {limit:.0f} s (see {log})"}
        finally:
            end_group(process)
    if not result.exists():
        return {"error": f"its process ended with code {code} (see {log})"}
    return json.loads(result.read_text())


def end_group(process: subprocess.Popen) -> None:
    """End what is left of a check's process and of those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def write_results(folder: Path, where: dict, records: dict[str, dict]) -> None:
    """`results.json`, and the same as a table in `results.md`."""
    temporary = folder / "results.json.partial"
    temporary.write_text(json.dumps({"where": where, "checks": records}, indent=2))
    temporary.replace(folder / "results.json")
    (folder / "results.md").write_text(report(where, records))


def report(where: dict, records: dict[str, dict]) -> str:
    """The table in Markdown, with what it was made on."""
    shapes = where["model"] or ("random weights of a tiny shape" if where["smoke"] else "random weights, 1.5B's shape")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, TRL {trl.__version__}"
    counts = [record["status"] for record in records.values()]
    told = ", ".join(f"{counts.count(one)} {one}" for one in ("pass", "fail", "skipped", "measured") if one in counts)
    rows = [row for name, record in records.items() for row in table_rows(name, record)]
    return f"{where['device']}; {shapes}; {versions}. Checks: {told}.\n\n{markdown_table(HEADER, rows)}\n"


def table_rows(name: str, record: dict) -> list[tuple]:
    """A line per finding; the first bears the name and the seconds."""
    findings = record["findings"]
    if not findings:
        return [(name, record["reason"].replace("|", "/"), "", "", record["status"], f"{record['seconds']:.0f}")]
    return [
        (
            "" if index else name,
            one["what"].replace("|", ""),
            f"{one['measured']:.4g}",
            one["goal"] or "–",
            one["status"],
            "" if index else f"{record['seconds']:.0f}",
        )
        for index, one in enumerate(findings)
    ]
