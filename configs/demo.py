"""All of CAST on generated street scenes, from nothing, in minutes on two CPU cores.

python -m cast_jax.main --config configs/demo.py:cast --workdir runs/demo

Scenes of a source look stand in for what a foundation model has seen; the task is a target look with few labels.
"""

from configs import common


def get_config(argument: str = "cast"):
    """``step[,seed=0][,smoke]``."""
    arguments = common.parse_arguments(argument)
    config = common.base(arguments, "configs/demo.py")
    config.pipeline = ("pretrain", *config.pipeline)
    config.data.kind = "scenes"
    config.data.update({"root": "", "split": "", "labelled": 16})
    config.steps = {"pretrain": common.teacher_step(steps=1, source="pretrain"), **config.steps}
    for name in ("finetune", "adapt"):
        config.steps[name].start = "pretrain"
    if arguments.smoke:
        common.smoke(config)
        config.data.labelled = 4
        return config
    common.tiny_models(config, (96, 192))
    config.data.max_instances = 24
    config.data.generated = {"train": 160, "val": 60, "source": 400, "image_size": (128, 256), "seed": 0}
    for name, steps in {
        "pretrain": 400,
        "finetune": 100,
        "adapt": 200,
        "distill": 400,
        "refine": 100,
        "student_supervised": 500,
    }.items():
        config.steps[name].train.update({"steps": steps, "log_every": 20, "save_every": 100})
    return config
