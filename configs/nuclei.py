"""Real images with few labels: 24 labelled and 136 unlabelled micrographs of nuclei, in about an hour on a CPU.

python -m cast_jax.main --config configs/nuclei.py:cast --workdir runs/nuclei \
    --config.data.labelled=labelled.json --config.data.unlabelled=unlabelled/ --config.data.val=val.json

Generated micrographs stand in for what a foundation model has seen: the teacher starts from all that it learned of
them, the student from the encoder alone. With --config.data.split=FILE fewer images keep their labels (README.md).
"""

from configs import common

STEPS = {
    "pretrain": 1200,
    "finetune": 80,
    "adapt": 60,
    "distill": 1050,
    "refine": 150,
}


def get_config(argument: str = "cast"):
    """``step[,seed=0][,smoke][,teacher=grounded_sam2_tiny][,system=cast]``."""
    arguments = common.parse_arguments(argument, teacher="")
    config = common.base(arguments, "configs/nuclei.py")
    config.pipeline = ("pretrain", *config.pipeline)
    config.data.kind = "nuclei"
    config.data.update(common.COCO)
    config.steps = {"pretrain": common.teacher_step(steps=1, source="pretrain"), **config.steps}
    for name in ("finetune", "adapt"):
        config.steps[name].start = "pretrain"
    for name in ("distill", "student_supervised") if not arguments.teacher else ():
        config.steps[name].start = "pretrain"  # as the paper's student from DINOv2: the encoder, and fresh decoders
    if arguments.smoke:
        common.smoke(config)
        common.teacher(config, arguments, default="")
        common.system(config, arguments)
        return config
    common.tiny_models(config, (128, 128))
    config.model.teacher = {"name": "student_resnet_tiny", "mask_decoder": {"query_stride": 4}}
    config.model.student = {
        "name": "student_resnet_tiny",
        "decoder": {"name": "fpn", "features": 24},
        "mask_decoder": {"query_stride": 4, "num_layers": 1},
    }
    config.data.max_instances = 64
    config.data.generated = {"train": 0, "val": 0, "source": 1200, "image_size": (256, 256), "seed": 0}
    # Cells have no upright, and a nucleus is only a few pixels wide: crops stay near the size that is predicted at.
    config.data.view.update({"scale": (0.8, 1.3), "crop_area": (0.5, 1.0), "min_area": 8})
    config.data.view.update({"flip_vertical": 0.5, "rotate90": True})
    config.evaluate.batch_size = 16
    common.small_steps(config, STEPS, log_every=20, save_every=100)
    # One view of an image meets its labels; the contrast alone compares two.
    for step in config.steps.values():
        if step.pseudo_labels:
            step.objective.update({"supervised_views": ("strong",), "pseudo_label_views": ("strong",)})
        else:
            step.data.views = ("strong",)
    for name in ("finetune", "adapt"):
        config.steps[name].optimizer.learning_rate = 5e-4
    # The labels alone, once more: at a high rate the student would forget what the pseudo-labels taught it.
    config.steps.refine.optimizer.learning_rate = 2e-4
    config.pseudo_labels.threshold = 0.5
    common.teacher(config, arguments, default="")
    common.system(config, arguments, ema_decay=0.99)
    return config
