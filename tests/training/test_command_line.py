import json
import signal

import pytest

pytestmark = pytest.mark.xdist_group("command_line")

TRAIN, EVALUATE = "experiments/train.py", "experiments/evaluate.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with broken config files, a file where a folder should be, and another run's workdir."""
    place = tmp_path_factory.mktemp("place")
    (place / "no_import.py").write_text("import not_there\n")
    (place / "no_syntax.py").write_text("def get_config(:\n")
    (place / "no_function.py").write_text("x = 1\n")
    (place / "no_config.py").write_text("def get_config(): return 3\n")
    (place / "bad_key.py").write_text(
        "import tiny, seqjax\n"
        "def get_config():\n"
        "    return seqjax.experiment_config(model={'name': 'tiny', 'embed_dmi': 3}, data={'name': 'tiny'})\n"
    )
    (place / "file").write_text("precious")
    (place / "foreign").mkdir()
    (place / "foreign" / "metrics.jsonl").write_text("precious")
    (place / "garbled").mkdir()
    (place / "garbled" / "config.json").write_text("{")
    return place


# What is given after script, config and workdir, and what the sentence must say.
OVERRIDES = [
    ("--config.optimizer.lerning_rate=1", "did you mean --config.optimizer.learning_rate?"),
    ("--config.optimizer=adam", "--config.optimizer is a section"),
    ("--config.training.num_steps=many", "--config.training.num_steps=many"),
    ("--config.training.num_steps=1.5", "--config.training.num_steps=1.5"),
    ("--config.model.vocab_size=many", "--config.model.vocab_size=many"),
    ("--config.optimizer.name=adamm", "optimizer.name='adamm' is unknown; did you mean 'adam'"),
    ("--config.model.name=tinny", "model.name='tinny' is unknown; did you mean 'tiny'"),
    ("--config.model.vocab_size=8", "model.vocab_size=8 contradicts data.name='tiny'"),
    ("--config.optimizer.rules=(('kernal','no_decay'),)", "'kernal' matches no parameter"),
    ("--config.mesh.tensor=7", "1, the devices there are"),
    ("--config.data.batch_size=0", "data.batch_size=0"),
    ("--config.training.microbatches=5", "allowed: multiples of 5"),
    ("--workdri=x", "workdir"),
    ("stray", "'stray' is not a flag"),
]
FILES = [
    ("missing.py", "there is no such file"),
    ("no_import.py", "No module named 'not_there'"),
    ("no_syntax.py", "SyntaxError"),
    ("no_function.py", "has no 'get_config'"),
    ("no_config.py", "returns int, not a ConfigDict"),
    ("bad_key.py", "model.embed_dmi is not an option; did you mean 'embed_dim'"),
]
WORKDIRS = [
    ("file", "is a file; give a folder"),
    ("file/under", "cannot be written: Not a directory"),
    ("foreign", "holds metrics.jsonl but no config.json"),
    ("garbled", "config.json cannot be read"),
]


@pytest.fixture(scope="module")
def mistakes(place, start):
    """What came of every mistake: `{command line: (exit status, stdout, stderr, expected)}`."""
    config, workdir = "--config=tests/training/tiny_config.py", f"--workdir={place / 'new'}"
    cases = [([TRAIN, config, workdir, flag], said) for flag, said in OVERRIDES]
    cases += [([TRAIN, f"--config={place / name}", workdir], said) for name, said in FILES]
    cases += [([TRAIN, config, f"--workdir={place / name}"], said) for name, said in WORKDIRS]
    cases += [
        ([TRAIN, config, "--workdir=/proc/none/run"], "cannot be written"),
        ([TRAIN, workdir], "--config is required"),
        ([TRAIN, config], "--workdir is required"),
        ([EVALUATE, workdir], "holds no run"),
        ([EVALUATE, workdir, "--import=not_there"], "--import=not_there cannot be imported"),
    ]
    process = start("tests/training/mistakes.py", JAX_LOG_COMPILES="1")
    out, err = process.communicate(json.dumps([arguments for arguments, _ in cases]))
    assert process.returncode == 0, err
    return [(*case, *result) for case, result in zip(cases, json.loads(out), strict=True)]


def test_every_mistake_is_one_sentence_and_a_usage_error(mistakes):
    for arguments, expected, status, out, err in mistakes:
        # Compilations are logged to stderr, so that a single line also says that there were none. Tracing is allowed.
        err = "".join(line for line in err.splitlines(keepends=True) if ":Finished tracing " not in line)
        assert (status, out, err.count("\n")) == (2, "", 1), (arguments, status, out, err)
        assert expected in err and "Traceback" not in err, (arguments, err)


def test_mistakes_change_nothing_on_disk(mistakes, place):
    assert not (place / "new").exists()
    assert (place / "file").read_text() == (place / "foreign" / "metrics.jsonl").read_text() == "precious"
    assert [path.name for path in (place / "foreign").iterdir()] == ["metrics.jsonl"]
    assert (place / "garbled" / "config.json").read_text() == "{"


def test_a_failed_run_exits_with_1_and_one_sentence(tmp_path, start_training):
    process = start_training(tmp_path / "run", "--config.data.poison=5")
    _, err = process.communicate()
    assert process.returncode == 1
    assert "step 6: loss is nan" in err and "checkpoints/4" in err and err.count("\n") == 1


def test_a_run_is_trained_continued_after_a_signal_and_evaluated(tmp_path, start, start_training):
    workdir = tmp_path / "run"
    process = start_training(workdir, "--config.data.delay=0.3", "--config.training.log_every=1")
    for line in process.stdout:
        if line.startswith("step 1/"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "Stopped by SIGINT" in out
    out, err = start_training(workdir).communicate()
    assert "Resuming from step" in out, err
    score = out.splitlines()[-1].removeprefix("bits/token: ").split()[0]
    process = start(EVALUATE, f"--workdir={workdir}", "--import=tiny", "--set=batch_size=3")  # the same examples
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.count("\n") == 1 and out.startswith(f"validation at step 12: loss {score} bits/token")
    result = json.loads((workdir / "evaluation_validation.json").read_text())
    assert f"{result['loss']:.4f}" == score and result["loss_unit"] == "bits/token"
