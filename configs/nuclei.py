"""A real data set that a small model learns from scratch: 24 labelled and 136 unlabelled microscopy images.

python -m cast_jax.main --config configs/nuclei.py:cast --workdir runs/nuclei \
    --config.data.labelled=labelled.json --config.data.unlabelled=unlabelled/ --config.data.val=val.json
"""

from configs import common

STEPS = {"finetune": 1000, "adapt": 150, "distill": 1500, "refine": 400, "student_supervised": 1900}


def get_config(argument: str = "cast"):
    """``step[,seed=0][,smoke][,teacher=grounded_sam2_tiny]``."""
    arguments = common.parse_arguments(argument, teacher="")
    config = common.base(arguments, "configs/nuclei.py")
    config.data.kind = "coco"
    config.data.update(common.COCO)
    if arguments.smoke:
        common.smoke(config)
        common.teacher(config, arguments, default="")
        return config
    common.tiny_models(config, (128, 128))
    config.model.teacher = {"name": "teacher_resnet_tiny"}
    config.model.student = {"name": "student_resnet_tiny", "decoder": {"name": "fpn", "features": 24}}
    config.data.max_instances = 56
    # Cells have no upright, and a nucleus is only a few pixels wide: crops stay near the size that is predicted at.
    config.data.view.update({"scale": (0.8, 1.6), "crop_area": (0.4, 1.0), "min_area": 8})
    config.data.view.update({"flip_vertical": 0.5, "rotate90": True})
    config.evaluate.batch_size = 16
    common.small_steps(config, STEPS, log_every=25, save_every=200)
    config.pseudo_labels.threshold = 0.5
    # There is no foundation model to be reset to: the teacher goes on from what it learned of the labels.
    config.steps.adapt.start = "finetune"
    config.steps.adapt.optimizer.learning_rate = 1e-3
    common.teacher(config, arguments, default="")
    return config
