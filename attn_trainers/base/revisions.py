"""Checkpoints on branches of the model's repository: `step-N` holds what a run had learnt after N updates."""

import logging
import shutil
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import HfApi


logger = logging.getLogger(__name__)

# What resumes a run, and the model's users do not need.
TRAINING_STATE = ["*.pt", "*.pth", "*_state.json", "global_step*", "optimizer*", "scheduler*", "seal.json", "latest"]
TRAINING_STATE += ["zero_to_fp32.py", "pytorch_model_fsdp_0/*"]
CARD_FILES = ("README.md", "trees.png")


class RevisionPushes:
    """
    Uploads of checkpoints to branches, in the background, one after the other.

    An upload that fails costs its branch, not the run: it is told with the command that makes up for it.

    Args:
        api: client of the Hub, with the run's token.
        repo_id: the model's repository.
    """

    def __init__(self, api: HfApi, repo_id: str):
        self.api = api
        self.repo_id = repo_id
        self._running: dict[Path, tuple[str, Future]] = {}

    @property
    def folders(self) -> list[Path]:
        """Checkpoints that are still read from."""
        return [folder for folder, (_, upload) in self._running.items() if not upload.done()]

    def start(self, folder: str | Path, step: int) -> None:
        """Upload the model, tokenizer and card of a checkpoint to the branch of its step."""
        self._tell()
        self._running[Path(folder)] = (
            f"step-{step}",
            self.api.run_as_future(self._upload, Path(folder), f"step-{step}"),
        )

    def finish(self) -> None:
        """Wait for what is under way."""
        for _, upload in self._running.values():
            upload.exception()
        self._tell()

    def _upload(self, folder: Path, branch: str) -> None:
        self.api.create_branch(self.repo_id, branch=branch, exist_ok=True)
        self.api.upload_folder(
            repo_id=self.repo_id,
            folder_path=folder,
            revision=branch,
            commit_message=f"Model after {branch.replace('-', ' ')}",
            ignore_patterns=TRAINING_STATE,
        )

    def _tell(self) -> None:
        """Tell of uploads that failed, and forget those that ended."""
        for folder, (branch, upload) in list(self._running.items()):
            if not upload.done():
                continue
            del self._running[folder]
            if error := upload.exception():
                logger.warning(
                    "The upload of %s to the branch %s failed (%s). While the folder is there, `hf upload %s %s . "
                    "--revision %s` makes up for it.",
                    folder,
                    branch,
                    error,
                    self.repo_id,
                    folder,
                    branch,
                )


def add_card(output_dir: str | Path, checkpoint: str | Path) -> None:
    """Put the card of the run, and the picture that it shows, beside a checkpoint's weights."""
    for name in CARD_FILES:
        if (Path(output_dir) / name).exists():
            shutil.copy(Path(output_dir) / name, checkpoint)
