"""A real data set that a small model learns from scratch: 24 labelled and 136 unlabelled microscopy images.

python -m cast_jax.main --config configs/nuclei.py:cast --workdir runs/nuclei \
    --config.data.labelled=labelled.json --config.data.unlabelled=unlabelled/ --config.data.val=val.json
"""

from configs import common

STEPS = {"finetune": 400, "adapt": 350, "distill": 400, "refine": 130, "student_supervised": 530}


def get_config(argument: str = "cast"):
    """``step[,seed=0][,smoke]``."""
    arguments = common.parse_arguments(argument)
    config = common.base(arguments, "configs/nuclei.py")
    config.data.kind = "coco"
    config.data.update({"labelled": "", "unlabelled": "", "val": "", "labelled_images": "", "val_images": ""})
    if arguments.smoke:
        common.smoke(config)
        return config
    common.tiny_models(config, (128, 128))
    config.data.max_instances = 56
    # Cells have no upright, and a nucleus is only a few pixels wide: crops stay near the size that is predicted at.
    config.data.view.update({"scale": (0.8, 1.6), "crop_area": (0.4, 1.0), "min_area": 8})
    config.data.view.update({"flip_vertical": 0.5, "rotate90": True})
    config.evaluate.batch_size = 16
    common.small_steps(config, STEPS, log_every=25, save_every=200)
    return config
