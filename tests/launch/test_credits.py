"""`--credit` and its settings, on the command line and from a YAML file."""

from dataclasses import dataclass, field

import pytest

from attn_trainers import AttnRLConfig
from attn_trainers.attnpo.method import AttnPOCredit
from attn_trainers.launch import credits
from attn_trainers.launch.recipe import MathScriptArguments, parse_with_credit
from attn_trainers.rhythm.method import RhythmCredit
from tests.helpers import refused_in_a_line


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """Settings of a trainer and its credit method, from options and the text of a YAML file."""

    def of(*options: str, config: str | None = None):
        argv = ["recipe.py", "--output_dir", str(tmp_path / "out"), "--use_cpu", "--bf16", "False"]
        argv += ["--per_device_train_batch_size", "30", "--save_strategy", "no", "--report_to", "none", *options]
        if config is not None:
            path = tmp_path / "settings.yaml"
            path.write_text(config)
            argv += ["--config", str(path)]
        monkeypatch.setattr("sys.argv", argv)
        _, args, _, credit = parse_with_credit(MathScriptArguments, AttnRLConfig)
        return args, credit

    return of


def test_no_credit_is_the_default(parse):
    assert parse()[1] is None
    assert parse("--credit", "none")[1] is None
    assert parse(config="credit: none")[1] is None


def test_a_credit_and_its_fields_on_the_command_line(parse):
    args, credit = parse("--credit", "rhythm", "--scheme", "local", "--top_fraction", "0.2", "--num_rollouts", "6")
    assert isinstance(credit, RhythmCredit) and args.num_rollouts == 6
    assert (credit.options.scheme, credit.options.top_fraction, credit.options.amplification) == ("local", 0.2, 1.5)
    _, credit = parse("--credit", "attnpo", "--heads", "[[0,1],[1,0]]", "--min_step_chars", "40")
    assert isinstance(credit, AttnPOCredit)
    assert credit.options.heads == [[0, 1], [1, 0]] and credit.options.min_step_chars == 40


def test_a_credit_and_its_fields_from_a_yaml_file(parse):
    _, credit = parse(config="credit: rhythm\npreset: paper_v1\nrow_offset: -1\nskip_punctuation: true\n")
    options = credit.options
    assert isinstance(credit, RhythmCredit)
    # The preset's values, where nothing else is set.
    assert (options.scheme, options.gamma_sign, options.fai_max_distance) == ("coupled", "pos", 50)
    assert options.row_offset == -1 and options.skip_punctuation is True
    # The command line goes before the file, for the method as for its fields.
    _, credit = parse("--row_offset", "0", config="credit: rhythm\nrow_offset: -1\n")
    assert credit.options.row_offset == 0
    _, credit = parse("--credit", "attnpo", config="credit: rhythm\n")
    assert isinstance(credit, AttnPOCredit)


def test_fields_that_both_have_are_the_trainers(parse):
    args, credit = parse("--credit", "rhythm", "--success_threshold", "0.9")
    assert args.success_threshold == credit.options.success_threshold == credit.success_threshold == 0.9
    args, credit = parse("--credit", "attnpo", "--end_of_thinking", "<done>")
    assert args.end_of_thinking == credit.options.end_of_thinking == "<done>"


def test_a_field_of_another_meaning_gets_a_name_of_its_own(parse, monkeypatch):
    @dataclass
    class Options:
        num_rollouts: int = field(default=3, metadata={"help": "Not the trainer's."})

    class Method(RhythmCredit):
        def __init__(self, options):
            self.options = options

        def check_trees(self):
            pass

    monkeypatch.setitem(credits.CREDITS, "rhythm", (Options, Method))
    args, credit = parse("--credit", "rhythm", "--num_rollouts", "6", "--credit_num_rollouts", "5")
    assert args.num_rollouts == 6 and credit.options.num_rollouts == 5


def test_an_unknown_credit_is_refused(parse, capsys):
    with refused_in_a_line(capsys, "invalid choice: 'rythm'"):
        parse("--credit", "rythm")
    with refused_in_a_line(capsys, "Refused: credit='rythm' is unknown; set it to one of none, attnpo, rhythm"):
        parse(config="credit: rythm\n")


def test_fields_of_another_credit_are_refused(parse, capsys):
    with refused_in_a_line(capsys, "Refused: .*'--scheme', 'local'"):
        parse("--scheme", "local")
    with refused_in_a_line(capsys, "Refused: .*'--heads'"):
        parse("--credit", "rhythm", "--heads", "[[0,1]]")
    with refused_in_a_line(capsys, "Refused: .*scheme"):
        parse(config="scheme: local\n")


@pytest.mark.parametrize("where", ["option", "file"])
def test_settings_that_do_not_go_with_trees_are_refused_in_a_line(parse, where, capsys):
    with refused_in_a_line(capsys, r"Refused: rhythm_lambda=0\.1 does not go with trees"):
        if where == "option":
            parse("--credit", "rhythm", "--rhythm_lambda", "0.1")
        else:
            parse(config="credit: rhythm\npreset: rhythm_reward\n")
    with refused_in_a_line(capsys, r"Refused: length_penalty=2\.0 is outside \[0, 1\]"):
        parse("--credit", "attnpo", "--length_penalty", "2")


@pytest.mark.parametrize(
    ("argv", "config", "name"),
    [
        ([], None, "none"),
        (["--credit", "rhythm"], None, "rhythm"),
        (["--credit=attnpo"], "credit: rhythm", "attnpo"),
        ([], "credit: rhythm\nlearning_rate: 1.0", "rhythm"),
        ([], "learning_rate: 1.0", "none"),
        ([], "", "none"),
        (["--credit_extra", "rhythm"], None, "none"),  # another option
    ],
)
def test_chosen_credit(tmp_path, argv, config, name):
    if config is not None:
        (tmp_path / "settings.yaml").write_text(config)
        argv = [*argv, "--config", str(tmp_path / "settings.yaml")]
    assert credits.chosen_credit(argv) == name


def test_a_config_that_is_no_file_is_left_to_the_parser():
    assert credits.chosen_credit(["--config", "absent.yaml"]) == "none"
