"""A small HTTP server that speaks the endpoints of vLLM that a client uses, and fails when it is told to.

It samples a function of weights, prompt and seed, so that samples of other weights are other samples.
"""

import json
import random
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from accelerate import Accelerator
from safetensors.torch import load_file

from attn_trainers.base.server import ServerGeneration, ServerSettings
from attn_trainers.sampling.requests import GenerationRequest


REQUESTS = [GenerationRequest([i % 3 + 1], 4, seed=i) for i in range(6)]
PROBE = [7 * position % 50 for position in range(32)]


def sum_of(file: Path) -> float:
    """Of all weights of a file."""
    return sum(float(tensor.double().sum()) for tensor in load_file(file).values())


def logps_of(weights: float, tokens) -> list[float]:
    """Log-probs of each token of a sequence but the first, under weights of a sum."""
    return [-1.0 - (weights + token) % 7 for token in tokens[1:]]


def build_engine(
    url: str, folder: Path, model, trainer_logps, probe=None, accelerator=None, **settings
) -> ServerGeneration:
    """A trainer's side of a server, without the trainer.

    Args:
        url: of the server.
        folder: for the output, and for weights on their way.
        model: that is trained.
        trainer_logps: see `ServerSettings`.
        probe: see there; some tokens of the fake server's own if left out.
        accelerator: of the rank, where there are several.
        settings: others of `ServerSettings`.
    """
    defaults = {"weight_sync": "disk", "lora_sync": "auto", "folder": folder / "weights", "request_seconds": 5.0}
    defaults |= {"output_dir": str(folder), "trainer_logps": trainer_logps, "probe": probe or (lambda: PROBE)}
    return ServerGeneration(
        ServerSettings(**(defaults | settings)),
        model=model,
        accelerator=accelerator or Accelerator(cpu=True),
        processing_class=None,
        server_base_url=url,
        server_timeout=1.0,
    )


class FakeServer:
    """
    Attributes:
        weights: sum of the weights it was given last, 0 after a start.
        adapters: sum of the weights of each adapter, by its name; sampled with on top of `weights`.
        lora: what it says of adapters, `None` where it takes none.
        max_model_len: what it says of the longest sequence.
        version: as vLLM keeps it.
        seen: path and body of each request.
        fails: called with path and number of the request; an HTTP status in place of an answer, or `None`. May raise
            `ConnectionError` to drop the connection.
    """

    def __init__(self, vocab_size: int = 50, port: int = 0, api_key: str | None = None):
        self.vocab_size, self.api_key = vocab_size, api_key
        self.lora: dict | None = None
        self.max_model_len = 64
        self.restart()
        self.seen: list[tuple[str, dict | None]] = []
        self.fails: Callable[[str, int], int | None] = lambda path, number: None
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def restart(self) -> None:
        """Forget what it was given."""
        self.weights, self.version, self.adapters = 0.0, "default", {}

    @property
    def port(self) -> int:
        return self._http.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def paths(self, path: str) -> list[dict | None]:
        """Bodies of the requests to a path."""
        return [body for one, body in self.seen if one == path]

    # ---- answers ----------------------------------------------------------------------------------------------------

    def answer(self, path: str, body: dict | None) -> tuple[int, dict]:
        if path == "/health":
            return 200, {}
        if path == "/v1/models":
            return 200, {"data": [{"id": "fake"}]}
        if path == "/server_info":
            environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": True} if self.lora else {}
            return 200, {"vllm_config": self._config() | {"lora_config": self.lora}, "vllm_env": environment}
        if path == "/weight_info":
            return 200, {"weight_version": self.version}
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return 200, {"success": True}
        if path in ("/reset_prefix_cache", "/abort_requests"):
            return 200, {"success": True}
        if path == "/v1/load_lora_adapter" and self.lora:
            assert body["lora_name"] not in self.adapters
            self.adapters[body["lora_name"]] = sum_of(Path(body["lora_path"]) / "adapter_model.safetensors")
            return 200, "Success: in words"
        if path == "/v1/unload_lora_adapter" and self.adapters.pop(body["lora_name"], None) is not None:
            return 200, "Success: in words"
        if path == "/collective_rpc":
            files = sorted(Path(body["kwargs"]["weights_path"]).glob("*.safetensors"))
            self.weights = sum(map(sum_of, files))
            return 200, {"results": [None]}
        if path == "/v1/completions":
            return self._complete(body)
        return 404, {}

    def _config(self) -> dict:
        model = {"max_model_len": self.max_model_len, "dtype": "torch.float32", "logprobs_mode": "processed_logprobs"}
        return {
            "model_config": model,
            "device_config": {"device": "cpu"},
            "scheduler_config": {"max_num_batched_tokens": 256, "max_num_seqs": 64},
            "weight_transfer_config": None,
        }

    def _complete(self, body: dict) -> tuple[int, dict]:
        prompt, model = body["prompt"], body["model"]
        if model != "fake" and model not in self.adapters:
            return 404, {"error": {"message": f"The model `{model}` does not exist."}}
        weights = self.weights + self.adapters.get(model, 0.0)
        if max(prompt) >= self.vocab_size:
            return 400, {"error": {"message": f"Token id {max(prompt)} is out of vocabulary"}}
        if "prompt_logprobs" in body:
            listed = [None] + [
                {str(t): {"logprob": logp}} for t, logp in zip(prompt[1:], logps_of(weights, prompt), strict=True)
            ]
            return 200, {
                "model": model,
                "choices": [{"index": 0, "prompt_logprobs": listed, "finish_reason": "length"}],
            }
        choices = []
        for index in range(body["n"]):
            rng = random.Random(f"{weights}/{prompt}/{body.get('seed')}/{index}")
            tokens = [rng.randrange(self.vocab_size) for _ in range(body["max_tokens"])]
            logprobs = {
                "tokens": [f"token_id:{token}" for token in tokens],
                "token_logprobs": [None, *[-float(token) for token in tokens[1:]]],
            }
            choices.append(
                {
                    "index": index,
                    "finish_reason": "length",
                    "token_ids": tokens,
                    "prompt_token_ids": prompt,
                    "logprobs": logprobs if body.get("logprobs") is not None else None,
                }
            )
        return 200, {"model": model, "choices": choices}

    def _handler(self):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def _serve(self):
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                path = urlsplit(self.path).path
                with fake._lock:
                    fake.seen.append((path, body))
                    number = len(fake.paths(path))
                try:
                    status = fake.fails(path, number)
                except ConnectionError:
                    self.close_connection = True
                    return
                if status is None and path.startswith("/v1") and fake.api_key:
                    status = None if self.headers.get("Authorization") == f"Bearer {fake.api_key}" else 401
                status, answer = (status, {"error": "told to fail"}) if status else fake.answer(path, body)
                text = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                with suppress(ConnectionError):  # of who gave up waiting
                    self.end_headers()
                    self.wfile.write(text)

            do_GET = do_POST = _serve

        return Handler
