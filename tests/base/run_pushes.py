"""Runs recipes that push to a Hub on loopback, loads what arrived as its card says, and writes what happened as JSON.

Started by test_hub.py in a process of its own, since the address of the Hub is read when its client is imported.
"""

import base64
import hashlib
import json
import os
import re
import runpy
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


COMMIT = "0123456789" * 4


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's HTTP interface as creating, pushing to and loading a model takes."""

    files: dict[str, dict[str, bytes]] = {}  # repository to path to content
    objects: dict[str, bytes] = {}  # large files by SHA-256
    tokens: set[str | None] = set()
    refuses_commits = False

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(self.path).partition("?")[0]
        self.tokens.add(self.headers["Authorization"])
        if path == "/api/repos/create":
            name = json.loads(body)["name"]
            owner = json.loads(body).get("organization", "me")
            self.files.setdefault(f"{owner}/{name}", {})
            return self.answer({"url": f"{self.base}/{owner}/{name}"})
        if path == "/api/validate-yaml":
            base = re.search(r"^base_model: (.*)$", json.loads(body)["content"], re.M)
            valid = base is None or re.fullmatch(r"[\w.-]+/[\w.-]+", base[1])
            errors = [] if valid else [{"message": f"base_model {base[1]} is no model id"}]
            return self.answer({"warnings": [], "errors": errors}, 200 if valid else 400)
        if match := re.fullmatch(r"/api/models/(.+)/branch/(.+)", path):
            self.files.setdefault(at(match[1], match[2]), {})
            return self.answer({})
        if match := re.fullmatch(r"/api/models/(.+)/preupload/[^/]+", path):
            names = [file["path"] for file in json.loads(body)["files"]]
            large = (".safetensors", ".bin", ".parquet")
            modes = {name: "lfs" if name.endswith(large) else "regular" for name in names}
            return self.answer(
                {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]}
            )
        if path.endswith(".git/info/lfs/objects/batch"):
            actions = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.base}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": actions})
        if match := re.fullmatch(r"/api/models/(.+)/commit/([^/]+)", path):
            files = self.files[at(match[1], match[2])]
            if Hub.refuses_commits:
                return self.answer({"error": "storage quota exceeded"}, 403)
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    files[value["path"]] = self.objects[value["oid"]]
            return self.answer({"commitUrl": f"{self.base}/{match[1]}/commit/{COMMIT}", "commitOid": COMMIT})
        return self.answer({"error": path}, 404)

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        self.objects[oid] = content
        self.answer({}, 200 if hashlib.sha256(content).hexdigest() == oid else 400)

    def do_GET(self):
        if match := re.fullmatch(r"/api/models/(.+)/revision/[^/]+", unquote(self.path).partition("?")[0]):
            siblings = [{"rfilename": name} for name in self.files[match[1]]]
            return self.answer({"id": match[1], "sha": COMMIT, "siblings": siblings})
        if match := re.fullmatch(r"/api/models/(.+)/tree/[^/]+", unquote(self.path).partition("?")[0]):
            files = self.files[match[1]].items()
            return self.answer([{"type": "file", "path": p, "size": len(c), "oid": COMMIT} for p, c in files])
        match = re.fullmatch(r"/(.+)/resolve/[^/]+/(.+)", unquote(self.path).partition("?")[0])
        content = self.files.get(match[1], {}).get(match[2]) if match else None
        if content is None:
            return self.answer({"error": self.path}, 404, {"X-Error-Code": "EntryNotFound"})
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self.answer(content, 200, {"X-Repo-Commit": COMMIT, "ETag": etag})

    do_HEAD = do_GET

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, content, status=200, headers=None):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def at(repository: str, branch: str) -> str:
    """Key of a branch's files."""
    return repository if branch == "main" else f"{repository}@{branch}"


def launch(recipe: Path, *arguments: object) -> str | None:
    """Run a recipe; the text of the RuntimeError it ended with, if any."""
    sys.argv = [str(recipe), *map(str, arguments)]
    try:
        runpy.run_path(str(recipe), run_name="__main__")
    except RuntimeError as error:
        return str(error)
    return None


def load_as_the_card_says(repository: str, base: Path):
    """The model that the code in the card's first code block makes, and the model's answer in its variables."""
    card = Hub.files[repository]["README.md"].decode()
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    code = code.replace('"path of _tiny-model"', repr(str(base)))
    variables: dict = {}
    exec(code, variables)
    return variables


def same_weights(model, folder: Path, file: str, prefix: str = "") -> int:
    """How many tensors of a weights file of the run's own folder the loaded model holds to the bit; all must be."""
    import torch
    from safetensors.torch import load_file

    loaded = model.state_dict()
    saved = load_file(folder / file)
    for name, tensor in saved.items():
        assert torch.equal(loaded[name.replace(".weight", ".default.weight") if prefix else name], tensor), name
    return len(saved)


def push_models(recipes: Path, folder: Path, data: Path) -> dict:
    """Three recipes push: a full model (first to a Hub that refuses), an adapter, and the best arm of a comparison."""
    from attn_trainers.base.interruption import last_whole_checkpoint

    common = (
        f"--tiny_model --dataset {data} --use_vllm false --report_to none --push_to_hub --max_steps 2 --save_steps 2 "
        "--max_completion_length 8 --per_device_train_batch_size 4 --gradient_accumulation_steps 1 "
        "--generation_batch_size 8 --gradient_checkpointing false --learning_rate 0.01"
    ).split()
    full = f"--output_dir {folder}/full --hub_model_id me/full --num_rollouts 2 --num_branch_points 1"
    full = [*common, *full.split(), "--rollouts_per_branch", "1", "--push_revisions"]
    adapter = (
        f"--output_dir {folder}/adapter --hub_model_id me/adapter --problem_column problem --answer_column answer"
    )
    adapter += " --push_revisions --num_generations 4 --use_peft --lora_r 4 --lora_target_modules all-linear"
    arm = (
        f"--cache_dir {folder}/cache --warm_start_steps 2 --num_operations 2 --num_train_problems 24 "
        "--num_eval_problems 4 --arms coupled --seeds 0 --max_steps 1 --per_device_train_batch_size 16 "
        f"--push_to_hub --hub_model_id me/arm --output_dir {folder}/arm"
    )
    result: dict = {}
    Hub.refuses_commits = True
    result["refusal"] = launch(recipes / "attnrl_1p5b.py", *full)
    result["arrived_while_refused"] = len(Hub.files.get("me/full", {}))
    result["checkpoint_after_refusal"] = Path(last_whole_checkpoint(folder / "full")).name
    Hub.refuses_commits = False
    result["second_launch"] = launch(recipes / "attnrl_1p5b.py", *full)
    result["adapter_launch"] = launch(recipes / "rhythm_4b.py", *common, *adapter.split())
    result["arm_launch"] = launch(recipes / "rhythm_tiny.py", *arm.split())
    return result


def evaluate_pushed(recipes: Path, folder: Path, data: Path) -> dict:
    """The pushed model is evaluated by its id and revision, and compared with itself."""
    output = folder / "evaluation"
    evaluation = f"--model me/full --revision main --data {data} --output_dir {output} --num_samples 2"
    evaluation += " --max_completion_length 4 --backend transformers"
    comparison = f"--compare {output} {output} --output_dir {folder}/compared"
    return {
        "evaluation_launch": launch(recipes / "evaluate.py", *evaluation.split()),
        "comparison_launch": launch(recipes / "evaluate.py", *comparison.split()),
        "evaluated": len((output / "problems.jsonl").read_text().splitlines()),
        "evaluated_revision": json.loads((output / "settings.json").read_text())["revision"],
        "comparison": (folder / "compared" / "comparison.md").read_text(),
    }


def load_pushed(folder: Path) -> dict:
    """The pushed models are loaded by the code of their cards, and their weights compared with the run's own."""
    full = load_as_the_card_says("me/full", folder)
    adapter = load_as_the_card_says("me/adapter", folder / "adapter" / "_tiny-model")
    tensors = same_weights(adapter["model"], folder / "adapter", "adapter_model.safetensors", prefix="default")
    return {
        "full_tensors": same_weights(full["model"], folder / "full", "model.safetensors"),
        "full_tokens": full["output"].shape[1] - full["inputs"]["input_ids"].shape[1],
        "adapter_tensors": tensors,
    }


def main(root: Path, folder: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(folder / "hub"),
        "HF_TOKEN": "hf_secret",
        "HF_HUB_DISABLE_XET": "1",  # large files by Git LFS's own protocol
    }
    data = folder / "problems.jsonl"
    data.write_text("".join(json.dumps({"problem": f"{i} + 1", "answer": str(i + 1)}) + "\n" for i in range(8)))
    recipes = root / "recipes"
    result = push_models(recipes, folder, data) | evaluate_pushed(recipes, folder, data) | load_pushed(folder)
    result["files"] = {repository: sorted(files) for repository, files in Hub.files.items()}
    cards = {name: files["README.md"] for name, files in Hub.files.items() if "README.md" in files}
    result["cards"] = {name: card.decode() for name, card in cards.items()}
    result["authorization"] = sorted(map(str, Hub.tokens))
    contents = [content for files in Hub.files.values() for content in files.values()]
    result["secret_pushed"] = any(b"hf_secret" in content for content in contents)
    (folder / "result.json").write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
