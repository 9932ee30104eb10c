"""One check in a process of its own: `python -m attn_trainers.gpu_check.worker NAME CONTEXT RESULT`.

What a check leaves on the GPU, an engine for one, ends with its process.
"""

import json
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

from .registry import Context, Skipped, load_checks


def main(name: str, context: str, result: str) -> None:
    """Run a check and write its findings, or why there are none."""
    try:
        findings = load_checks()[name].run(Context.from_json(context))
        record = {"findings": [asdict(one) | {"goal": one.goal, "status": one.status} for one in findings]}
    except Skipped as reason:
        record = {"skipped": str(reason)}
    except Exception as error:
        traceback.print_exc()
        record = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    Path(result).write_text(json.dumps(record))


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # an engine's teardown is waited for by nobody
