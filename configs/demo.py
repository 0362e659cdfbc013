"""All of CAST on generated street scenes, from nothing, in minutes on two CPU cores.

python -m cast_jax.main --config configs/demo.py:cast --workdir runs/demo

Scenes of a source look stand in for what a foundation model has seen; the task is a target look with few labels.
"""

from configs import common

STEPS = {
    "pretrain": 4000,
    "finetune": 150,
    "adapt": 150,
    "distill": 450,
    "refine": 80,
}
LONG = {"pretrain": 4000, "finetune": 150, "adapt": 150, "distill": 1500, "refine": 100}


def get_config(argument: str = "cast"):
    """``step[,seed=0][,smoke][,long][,teacher=grounded_sam2_tiny][,system=cast]``.

    ``long``: the README's experiment, most of an hour. A teacher that was pretrained for longer, only 8 labels, and a
    student that has the pretrained encoder and nothing else.
    """
    arguments = common.parse_arguments(argument, teacher="", long=False)
    config = common.base(arguments, "configs/demo.py")
    config.pipeline = ("pretrain", *config.pipeline)
    config.data.kind = "scenes"
    config.data.update({"root": "", "split": "", "labelled": 16})
    config.steps = {"pretrain": common.teacher_step(steps=1, source="pretrain"), **config.steps}
    for name in ("finetune", "adapt"):
        config.steps[name].start = "pretrain"
    for name in ("distill", "student_supervised") if not arguments.teacher else ():
        # As the paper's student starts from DINOv2: what was pretrained, with a fresh mask decoder.
        config.steps[name].update({"start": "pretrain", "start_parts": ("encoder", "decoder")})
    if arguments.smoke:
        common.smoke(config)
        config.data.labelled = 4
        common.teacher(config, arguments, default="")
        common.system(config, arguments)
        return config
    common.tiny_models(config, (64, 128))
    for role in config.model:
        config.model[role] = {
            "name": "student_resnet_tiny",
            "decoder": {"name": "fpn", "features": 24},
            "mask_decoder": {"query_stride": 6, "num_layers": 1},
        }
    config.data.max_instances = 24
    config.data.generated = {"train": 160, "val": 60, "source": 600, "image_size": (128, 256), "seed": 0}
    # A scene's objects are a dozen pixels wide: crops stay near the size that is predicted at.
    config.data.view.update({"scale": (0.8, 1.4), "crop_area": (0.4, 1.0), "min_area": 8})
    common.small_steps(config, STEPS, log_every=20, save_every=100)
    config.steps.pretrain.data.views = ("strong",)
    config.steps.pretrain.objective.supervised_views = ("strong",)
    for name in ("finetune", "adapt"):
        config.steps[name].optimizer.learning_rate = 1e-3
    # The labels alone, once more: at a high rate the student would forget what the pseudo-labels taught it.
    config.steps.refine.optimizer.learning_rate = 2e-4
    config.pseudo_labels.threshold = 0.5
    if arguments.long:
        _long(config)
    common.teacher(config, arguments, default="")
    common.system(config, arguments, ema_decay=0.99)
    return config


def _long(config) -> None:
    config.model.teacher = {"name": "student_resnet_tiny", "mask_decoder": {"query_stride": 4}}
    config.data.labelled = 8
    for name, steps in LONG.items():
        config.steps[name].train.steps = steps
    for name in ("distill", "student_supervised"):
        config.steps[name].start_parts = ("encoder",)
    for name, rate in (("finetune", 5e-4), ("adapt", 5e-4), ("refine", 1e-4)):
        config.steps[name].optimizer.learning_rate = rate
