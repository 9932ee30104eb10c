"""Pictures, pages and completions at each log: on disk, and in trackers that may fail."""

import logging
from types import SimpleNamespace

import pandas as pd
import pytest
from matplotlib.image import imread
from transformers import ProgressCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback

from attn_trainers import AttnPOConfig, AttnPOTrainer, AttnRLConfig, AttnRLTrainer, RhythmConfig, RhythmTrainer
from attn_trainers.attnrl.pictures import plot_trees
from attn_trainers.attnrl.pipeline import Draw
from attn_trainers.attnrl.rollouts import PromptRollouts, branches_of
from attn_trainers.base.exhibits import ExhibitCallback, Page, completions_markdown
from attn_trainers.base.log_line import COMMON, log_line
from attn_trainers.base.pages import credit_page, shade
from attn_trainers.rhythm.method import RhythmCredit
from attn_trainers.rhythm.options import RhythmOptions
from tests.helpers import make_continuation, make_rollout, odd_sum


class Board(TensorBoardCallback):
    """TensorBoard without TensorBoard: what its writer is told."""

    def __init__(self):
        self.told = []
        self.tb_writer = SimpleNamespace(
            add_text=lambda name, text, step: self.told.append((name, step, text)),
            add_image=lambda name, pixels, step, dataformats: self.told.append((name, step, pixels.shape)),
            flush=lambda: None,
        )

    on_train_begin = on_log = on_train_end = TrainerCallback.on_log


class Track(TrackioCallback):
    """trackio without trackio, which fails from its `fails_from`-th message on."""

    def __init__(self, fails_from: int = 10**6):
        self.told, self.fails_from = [], fails_from
        self._trackio = SimpleNamespace(
            Html=lambda html: ("html", html), Image=lambda path: ("image", path), log=self.log
        )

    def log(self, values):
        if len(self.told) >= self.fails_from:
            raise ConnectionError("no route")
        self.told.append(values)

    on_train_begin = TrainerCallback.on_log

    def on_log(self, *args, **kwargs):
        self.log({"metrics": 1})

    def on_train_end(self, *args, **kwargs):
        self.log({"end": 1})


METHODS = {
    "AttnRL": (AttnRLTrainer, AttnRLConfig, {"min_branch_spacing": 0, "influence_delta": 1}),
    "AttnPO": (AttnPOTrainer, AttnPOConfig, {"num_generations": 4, "heads": [[0, 1]]}),
    "Rhythm": (RhythmTrainer, RhythmConfig, {"num_generations": 4}),
}


@pytest.fixture
def build(tiny_model_dir, tiny_tokenizer, arithmetic_dataset, tmp_path):
    def build(method, callbacks=(), credit=None, **settings):
        trainer_class, config_class, own = METHODS[method]
        args = {
            "per_device_train_batch_size": 30 if method == "AttnRL" else 8,
            "max_steps": 2,
            "max_completion_length": 12,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
        }
        more = {} if credit is None else {"credit": credit}
        return trainer_class(
            str(tiny_model_dir),
            odd_sum,
            config_class(str(tmp_path / "run"), **args | own | settings),
            train_dataset=arithmetic_dataset,
            eval_dataset=arithmetic_dataset.select(range(2)),
            processing_class=tiny_tokenizer,
            callbacks=list(callbacks),
            **more,
        )

    return build


@pytest.mark.parametrize("method", METHODS)
def test_what_is_switched_on_is_shown_at_each_log(build, tmp_path, method):
    board, track = Board(), Track()
    trees = {"log_trees": True} if method == "AttnRL" else {}
    trainer = build(method, [board, track], log_pages=True, log_completions=True, num_completions_to_print=3, **trees)
    trainer.train()
    kinds = ["trees"] * bool(trees) + ["pages"]
    assert sorted(path.name for path in (tmp_path / "run" / "pages").iterdir()) == [
        "step-000001.html",
        "step-000002.html",
    ]
    assert [(name, step) for name, step, _ in board.told] == [
        (name, step) for step in (1, 2) for name in [*kinds, "completions"]
    ]
    shown = [(name, step) for name, step, _ in board.told]
    assert shown.count(("pages", 2)) == 1
    tables = [text for name, _, text in board.told if name == "completions"]
    assert all(len(table.splitlines()) == 2 + 3 for table in tables)
    sent = [values for values in track.told if values.keys() & {"trees", "pages"}]
    assert [values["train/global_step"] for values in sent] == [1] * len(kinds) + [2] * len(kinds)
    if trees:
        height, width, _ = imread(tmp_path / "run" / "trees" / "step-000002.png").shape
        assert [shape for name, step, shape in board.told if (name, step) == ("trees", 2)] == [(height, width, 3)]
    assert not trainer.exhibits.failures


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_made_where_nothing_is_switched_on(build, tmp_path, method):
    board = Board()
    trainer = build(method, [board])
    trainer.train()
    assert board.told == [] and not any((tmp_path / "run" / name).exists() for name in ("trees", "pages"))
    assert getattr(trainer, "last_prompts", []) == []


def test_a_tracker_that_fails_does_not_end_the_run(build, caplog, tmp_path):
    board, track = Board(), Track(fails_from=1)
    trainer = build("Rhythm", [board, track], log_pages=True)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    # Of two logs each sends metrics and a page, the end of training and its last log one more each: all but the first.
    assert (trainer.state.global_step, trainer.exhibits.failures["trackio"]) == (2, 5)
    told = [record.message for record in caplog.records if "trackio failed" in record.message]
    assert len(told) == 2 and "no route" in told[0] and told[1] == "trackio failed 5 times in this run."
    assert [name for name, _, _ in board.told] == ["pages", "pages"]


def test_an_exhibit_that_cannot_be_made_costs_itself_only(tmp_path, caplog):
    callback = ExhibitCallback(tmp_path, list)
    callback.offer("broken", lambda: 1 / 0)
    callback.offer("pages", lambda: Page("<p>", "p"))
    state = SimpleNamespace(is_world_process_zero=True, global_step=7)
    callback.on_log(None, state, None)
    assert callback.failures == {"broken": 1}
    assert (tmp_path / "pages" / "step-000007.html").read_text() == "<p>"
    callback.offer("pages", lambda: 1 / 0)
    callback.on_log(None, SimpleNamespace(is_world_process_zero=False, global_step=8), None)  # another rank makes none
    assert callback.failures == {"broken": 1}


def test_completions_name_their_tree_branch_and_credit(build, tmp_path):
    credit = RhythmCredit(RhythmOptions(scheme="coupled"))
    trainer = build("AttnRL", credit=credit, log_completions=True, eval_strategy="steps", eval_steps=1)
    trainer.keeps_prompts = True
    trainer.train()
    frame = pd.read_parquet(tmp_path / "run" / "completions" / "completions_00002.parquet")
    frame = frame[frame["tree"].notna()]  # the others are the evaluation's
    rollouts = [(p, i, rollout) for p in trainer.last_prompts for i, rollout in enumerate(p.rollouts)]
    leaves = [(p, i, leaf) for p, i, rollout in rollouts for leaf in [rollout, *branches_of(rollout)]]
    latest = frame.iloc[-len(leaves) :] if len(frame) >= len(leaves) else frame
    expected = [(f"{p.draw.serial}/{i}", getattr(leaf, "offset", 0)) for p, i, leaf in leaves][-len(latest) :]
    assert list(zip(latest["tree"], latest["branch"], strict=True)) == expected
    credited = latest["credit"].dropna()
    assert len(credited) and ((credited >= 1.0) & (credited <= 2.0)).all()


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_an_evaluation_do_not_shift_the_columns(build, tmp_path, method):
    evaluates = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "num_generations_eval": 1}
    trainer = build(method, log_completions=True, **evaluates)
    trainer.train()
    frame = pd.read_parquet(tmp_path / "run" / "completions" / "completions_00002.parquet")
    column = "tree" if method == "AttnRL" else "credit"
    assert frame[column].notna().sum() and frame[column].isna().sum()


def test_trees_of_a_problem_with_dollars_are_drawn(tmp_path):
    rollout = make_rollout([1, 2, 3, 4], 1.0, [make_continuation(2, [5, 6], 0.0)], step_ranges=[(0, 2), (2, 4)])
    prompt = PromptRollouts(Draw(0, 0), {"prompt": "x"}, [1], [rollout])
    assert prompt.num_mixed_trees == 1
    plot_trees(prompt, "A pen is $3_{, two are $\\frac 6.\n" * 30, tmp_path / "trees.png")
    assert imread(tmp_path / "trees.png").shape[2] == 4


def test_a_page_shades_each_run_of_like_tokens(tiny_tokenizer):
    ids = tiny_tokenizer("1 + 2 = 3")["input_ids"]
    advantages, factors = [1.0, 1.0, *[-0.5] * (len(ids) - 2)], [1.0, 2.0, *[1.0] * (len(ids) - 2)]
    page = credit_page(tiny_tokenizer, ids, ids, advantages, factors, "T", ["<fact>"])
    assert page.html.count('<span style="background:') == 2 + 3  # the legend's, and the runs
    assert f'background:{shade(0.5)}" title="advantage +1.000, factor 1.00"' in page.html
    assert f'background:{shade(1.0)}" title="advantage +1.000, factor 2.00"' in page.html
    assert f'background:{shade(-0.25)}" title="advantage -0.500, factor 1.00"' in page.html
    assert "&lt;fact&gt;" in page.html and "<fact>" not in page.markdown
    assert shade(0.0) == "#ffffff"


def test_a_table_of_completions_escapes_what_is_written_in_it():
    columns = {"prompt": ["p", "p", [{"role": "user", "content": "a|b\n<c>"}]], "reward": [0.5, None, 1.0]}
    lines = completions_markdown(columns, 2, unique_prompts=True).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert cells == [["p", "0.5"], ["a&#124;b<br>&lt;c>", "1"]]


def test_the_line_of_a_log():
    logs = {"reward": 0.314, "completions/mean_length": 412.4, "completions/mean_thinking_length": 371.0, "loss": 1.0}
    logs |= {"attnrl/influence/mean": 0.9, "attnrl/valid_ratio": 0.62, "entropy": None}
    fields = COMMON | {"attnrl/influence/mean": "  influence {:.2g}", "attnrl/valid_ratio": "  mixed {:.0%}"}
    line = "step 40  reward 0.31  length 412 (thinking 371)  influence 0.9  mixed 62 %"
    assert log_line(logs, 40, fields) == line
    evaluated = {"eval_aime_pass@1": 0.25, "eval_aime_reward": 0.2, "eval_runtime": 3.0}
    assert log_line(evaluated, 40, fields) == "step 40  evaluation of aime  pass@1 25 %  reward 0.20"
    assert log_line({"train_runtime": 12.4, "train_loss": 0.0}, 100, fields) == "100 steps in 12 s"
    assert log_line({"loss": 1.0}, 40, fields) is None


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_each_log_prints_its_line_and_no_metrics(build, capsys, disable_tqdm):
    build("Rhythm", disable_tqdm=disable_tqdm).train()
    output = "".join(capsys.readouterr())
    assert output.count("step 1  reward ") == output.count("step 2  reward ") == 1
    assert output.count("2 steps in ") == 1 and "learning_rate" not in output
    build("Rhythm", disable_tqdm=disable_tqdm, log_line=False).train()
    output = "".join(capsys.readouterr())
    assert "step 1  reward" not in output and "learning_rate" in output


def test_another_bar_of_the_users_is_left_alone(build):
    trainer = build("Rhythm", log_line=False)
    assert any(type(callback) is ProgressCallback for callback in trainer.callback_handler.callbacks)


def test_revisions_need_a_repository_and_checkpoints(tmp_path):
    with pytest.raises(ValueError, match="push_revisions=True with push_to_hub=False"):
        RhythmConfig(str(tmp_path), push_revisions=True, use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="push_revisions=True with save_strategy='no'"):
        RhythmConfig(
            str(tmp_path), push_revisions=True, push_to_hub=True, save_strategy="no", use_cpu=True, bf16=False
        )
