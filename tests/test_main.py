"""What the front door says to faulty commands: one readable message and exit code 1, never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cast_jax import main
from cast_jax.core.config import build
from cast_jax.settings import StepConfig
from configs import demo

ROOT = Path(__file__).parent.parent
CONFIG = ("--config", "configs/demo.py:cast,smoke")

# Imports once, then runs each command of a list in a fork of its own: most of a start's time goes into imports.
DRIVER = """
import json, os, sys
from cast_jax import main
for number, arguments in enumerate(json.load(sys.stdin)):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(f"{sys.argv[1]}/{number}", os.O_CREAT | os.O_WRONLY), 2)
        sys.argv[1:] = arguments
        try:
            main.run()
        except SystemExit as stop:  # as Python does it, without the second that its clean-up takes
            print(stop.code if isinstance(stop.code, str) else "", file=sys.stderr, flush=True)
            os._exit(1 if isinstance(stop.code, str) else stop.code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(f"{sys.argv[1]}/{number}", "a") as file:
        file.write(f"exit code {status}")
"""


def test_help():
    command = [sys.executable, "-m", "cast_jax.main", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--config: What to run: configs/<name>.py:<step>" in result.stdout
    assert "--workdir: Folder of the run" in result.stdout


def test_a_configuration_is_read_from_any_folder_and_what_it_names_is_named(tmp_path):
    given = ("--config.data.labelled=gone.json", "--config.data.val=v.json", "--config.data.unlabelled=u")
    command = [sys.executable, "-m", "cast_jax.main", "--config", f"{ROOT}/configs/coco.py:cast,smoke", *given]
    result = subprocess.run([*command, "--workdir", "run"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == "error: config.data.labelled: gone.json: no such annotation file"


def test_a_configuration_of_one_s_own_lies_anywhere(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "cells.py").write_text((ROOT / "configs" / "coco.py").read_text())
    command = [sys.executable, "-m", "cast_jax.main", "--config", "mine/cells.py:cast", "--workdir", "run"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stderr.strip().splitlines()[-1].startswith("error: config.data.labelled is not set")


def test_what_a_configuration_leaves_unsaid_can_be_set():
    config = demo.get_config("cast,smoke")
    step = config.steps.distill
    with config.unlocked():
        for path, text in (
            ("objective.contrastive.symmetric", "true"),
            ("objective.contrastive.num_anchors", "None"),
            ("objective.criterion.dice_weight", "4"),
            ("train.ema_decay", "0.99"),
            ("optimizer.learning_rate", "1e-3"),
            ("pseudo_labels", "8"),  # a text stays one
        ):
            main._set_field(config, main._FIELD.fullmatch(f"--config.steps.distill.{path}={text}"))
        for path, text, wanted in (("train.steps", "1.5", "must be of type int"), ("train", "3", "holds .*steps; set")):
            argument = f"--config.steps.distill.{path}={text}"
            with pytest.raises(TypeError, match=f"^{argument}: {path.split('.')[-1]} {wanted}"):
                main._set_field(config, main._FIELD.fullmatch(argument))
    contrastive = {name: dict(config.steps[name].objective.contrastive) for name in ("distill", "adapt")}
    assert contrastive["distill"] == contrastive["adapt"] | {"symmetric": True, "num_anchors": None}
    built = build(StepConfig, step.to_dict(), "distill")
    assert (built.objective.criterion.dice_weight, built.optimizer.learning_rate) == (4.0, 1e-3)
    assert built.pseudo_labels == "8"


FAULTS = [
    ((), "--config must have a value"),
    (CONFIG, "--workdir must have a value"),
    (("--config", "configs/demo.py:distil"), "unknown step 'distil'; known steps: cast, pretrain"),
    (("--config", "configs/demo.py:cast,sead=1"), "unknown config argument 'sead'; known: seed, smoke"),
    (("--config", "configs/none.py:cast"), "No such file or directory: 'configs/none.py'"),
    ((*CONFIG, "--config.x.y=3"), "error: --config.x.y=3: the configuration has no 'x'"),
    ((*CONFIG, "--config.data.image_sise=3"), "the configuration has no 'image_sise'. Did you mean \"image_size\""),
    ((*CONFIG, "--config.data.max_instances=many"), "invalid literal for int() with base 10: 'many'"),
    ((*CONFIG, "--nonsense"), "Unknown command line flag 'nonsense'"),
    ((*CONFIG, "nonsense"), "unknown arguments: nonsense"),
    (("--config", "configs/cityscapes.py:cast"), "config.data.root is not set"),
    ((*CONFIG, "--config.mesh.data=3"), "mesh {'data': 3, 'fsdp': 1} does not fit"),
    ((*CONFIG, "--config.runtime.debug_nan=1"), "the configuration has no 'debug_nan'. Did you mean \"debug_nans\""),
    ((*CONFIG, "--config.pseudo_labels.threshold=1.5"), "config.pseudo_labels.threshold is 1.5; it must lie in [0, 1]"),
    ((*CONFIG, "--workdir", "README.md"), "--workdir README.md cannot be written to (File exists); name another"),
    ((*CONFIG, "--workdir", "README.md/run"), "--workdir README.md/run cannot be written to (Not a directory)"),
    ((*CONFIG, "--workdir", "/proc/run"), "--workdir /proc/run cannot be written to ("),
    ((*CONFIG, "--config.model.teacher.name=sam"), "config.model.teacher.name 'sam' is unknown; known: student_s"),
    (
        (*CONFIG, "--config.model.student.mask_decoder.querys=3"),
        "config.model.student.mask_decoder: unknown key querys",
    ),
    ((*CONFIG, "--config.model.student.encoder.embed_dim=wide"), "embed_dim=wide: embed_dim must be of type int"),
    ((*CONFIG, "--config.steps.distil.start=adapt"), "the configuration has no 'distil'"),
    (
        (*CONFIG, "--config.steps.distill.train.steps=many"),
        "--config.steps.distill.train.steps=many: steps must be of type int",
    ),
    ((*CONFIG, "--config.steps.distill.optimizer.beta=0.9"), "config.steps.distill.optimizer: unknown key beta"),
    (
        (*CONFIG, "--config.steps.distill.objective.contrastive.symmetric=3"),
        "config.steps.distill.objective.contrastive.symmetric",
    ),
    ((*CONFIG, "--config.model.pupil.name=student_s"), "the configuration has no 'pupil'"),
    ((*CONFIG, "--config.data.view.brightness=loud"), "config.data.view.brightness"),
    ((*CONFIG, "--config.data.view.britness=0.3"), "config.data.view: unknown key britness"),
    ((*CONFIG, "--config.steps.adapt.train.steps", "many"), "adapt.train.steps=many: steps must be of type int"),
    ((*CONFIG, "--config.steps.adapt.train.ema_decay=0.9"), "train.ema_decay keeps an average that nothing reads"),
    (("--config", "configs/coco.py:cast,smoke,size=500"), "smoke has small images of its own: leave size= out"),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> list[str]:
    """What each faulty command wrote to stderr, and its exit code."""
    folder, workdir = tmp_path_factory.mktemp("answers"), tmp_path_factory.mktemp("run")
    commands = [
        [*arguments] if arguments == () or "--workdir" in message else [*arguments, "--workdir", str(workdir)]
        for arguments, message in FAULTS
    ]
    driver = [sys.executable, "-c", DRIVER, str(folder)]
    subprocess.run(driver, cwd=ROOT, input=json.dumps(commands), text=True, check=True)
    return [(folder / str(number)).read_text() for number in range(len(FAULTS))]


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=[message for _, message in FAULTS])
def test_faults_are_one_message(answers, number):
    answer = answers[number]
    assert FAULTS[number][1] in answer
    assert answer.endswith("exit code 1")
    assert "Traceback" not in answer


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        ("UNAVAILABLE: failed to connect to all addresses", True),
        ("FAILED_PRECONDITION: Buffer Definition Event: Gloo all-reduce failed: Connection closed by peer", True),
        ("INTERNAL: NCCL operation ncclAllReduce failed: remote process exited", True),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.", False),
        ("INTERNAL: Autotuning failed for HLO", False),
    ],
)
def test_only_what_says_so_is_a_lost_process(said, lost):
    assert bool(main._OTHERS_FAULT.search(said)) == lost
