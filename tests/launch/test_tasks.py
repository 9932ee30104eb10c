"""`--task` of the recipes on small tasks."""

from trl import GRPOConfig

from attn_trainers.launch.tasks import parse_task
from attn_trainers.tiny.runs import TinyArguments
from tests.helpers import refused_in_a_line


def test_the_named_task_decides_the_defaults(monkeypatch, tmp_path, capsys):
    def parsed(*options):
        monkeypatch.setattr("sys.argv", ["recipe", *options])
        return parse_task((TinyArguments, GRPOConfig), {"max_completion_length": 320, "noise": 0.03})

    common = ("--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false")
    tiny, args = parsed(*common)
    assert (tiny.task, tiny.noise, args.max_completion_length) == ("chain", None, GRPOConfig.max_completion_length)
    tiny, args = parsed(*common, "--task", "dependencies")
    assert (tiny.noise, args.max_completion_length) == (0.03, 320)
    tiny, args = parsed(*common, "--task=dependencies", "--max_completion_length", "64")
    assert args.max_completion_length == 64
    (tmp_path / "config.yaml").write_text("task: dependencies\n")
    with refused_in_a_line(capsys, "task='dependencies' stands in a config file; give --task dependencies"):
        parsed(*common, "--config", str(tmp_path / "config.yaml"))
