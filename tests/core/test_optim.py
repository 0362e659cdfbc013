"""Schedules at hand-worked steps, AdamW against torch's, and rules that do not let a mistake pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cast_jax.core.errors import UserError
from cast_jax.core.optim import OptimizerConfig, ema_update, make_optimizer, make_schedule
from cast_jax.core.rules import named_leaves


def params():
    rng = np.random.default_rng(0)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "encoder": {"blocks": {"0": {"kernel": array(3, 4), "bias": array(4)}}, "position_embedding": array(2, 4)},
        "head": {"kernel": array(4, 2), "norm": {"scale": array(4)}},
    }


def rates(steps, at, **config):
    schedule = make_schedule(OptimizerConfig(learning_rate=1.0, **config), steps)
    return [float(schedule(step)) for step in at]


def test_multi_step_drops_at_fractions_of_the_whole_run():
    at = (0, 89, 90, 94, 95, 99)
    np.testing.assert_allclose(rates(100, at, schedule="multi_step"), [1, 1, 0.1, 0.1, 0.01, 0.01], rtol=1e-6)
    warm = rates(100, (0, 4, 9, 10, 89, 90), schedule="multi_step", warmup_steps=10)
    np.testing.assert_allclose(warm, [1 / 11, 5 / 11, 10 / 11, 1, 1, 0.1], rtol=1e-6)


def test_polynomial_and_cosine():
    expected = [1.0, 0.5**0.9, 0.01**0.9]
    np.testing.assert_allclose(rates(100, (0, 50, 99), schedule="polynomial"), expected, rtol=1e-5)
    np.testing.assert_allclose(rates(100, (0, 50, 100), schedule="cosine"), [1.0, 0.5, 0.0], atol=1e-6)


def test_warmup_precedes_the_schedule_proper():
    found = rates(14, (0, 2, 3, 4, 9), schedule="polynomial", power=1.0, warmup_steps=4)
    np.testing.assert_allclose(found, [0.2, 0.6, 0.8, 1.0, 0.5], rtol=1e-6)


def test_faulty_schedules_raise():
    with pytest.raises(UserError, match=r"schedule 'linear' is unknown; known: constant, multi_step, polynomial, "):
        OptimizerConfig(schedule="linear")
    with pytest.raises(UserError, match="warmup_steps"):
        make_schedule(OptimizerConfig(warmup_steps=10), 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0; it must lie in \(0, inf\)"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"weight_decay": float("inf")}, "weight_decay is inf"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"milestones": (0.5, 1.5)}, r"milestones is \(0\.5, 1\.5\); it must lie in \[0, 1\]"),
        ({"b2": 1.0}, "b2 is 1.0"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"learning_rate_rules": ((".*", -1.0),)}, r"learning_rate_rules has \('\.\*', -1\.0\)"),
    ],
)
def test_numbers_out_of_range_are_named(changes, message):
    with pytest.raises(UserError, match=f"^{message}"):
        OptimizerConfig(**changes)


def test_updates_are_those_of_torch_adamw_with_groups_and_clipping():
    config = OptimizerConfig(
        learning_rate=0.1,
        schedule="multi_step",
        milestones=(0.5,),
        weight_decay=0.3,
        clip_norm=0.7,
        learning_rate_rules=((r"encoder/.*", 0.1), (".*", 1.0)),
        frozen=(r"head/norm/.*",),
    )
    start = params()
    optimizer = make_optimizer(config, start, 6)
    reference = {name: torch.nn.Parameter(torch.tensor(np.asarray(leaf))) for name, leaf in named_leaves(start).items()}
    trained = [name for name in reference if not name.startswith("head/norm")]
    groups = [
        {
            "params": [reference[name]],
            "lr": 0.1 * (0.1 if name.startswith("encoder") else 1.0),
            "weight_decay": 0.3 if name.endswith("kernel") else 0.0,
        }
        for name in trained
    ]
    torch_optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    torch_schedule = torch.optim.lr_scheduler.MultiStepLR(torch_optimizer, [3], 0.1)
    apply = jax.jit(optimizer.apply)
    current, opt_state = start, optimizer.init(start)
    rng = np.random.default_rng(1)
    for step in range(6):
        gradients = {name: rng.normal(size=reference[name].shape).astype(np.float32) for name in trained}
        for name in trained:
            reference[name].grad = torch.tensor(gradients[name])
        expected = torch.nn.utils.clip_grad_norm_([reference[name] for name in trained], 0.7)
        torch_optimizer.step()
        torch_schedule.step()
        current, opt_state, norm = apply(gradients, opt_state, current, jnp.asarray(step))
        np.testing.assert_allclose(norm, expected.item(), rtol=1e-6)
    for name, leaf in named_leaves(current).items():
        np.testing.assert_allclose(leaf, reference[name].detach().numpy(), rtol=2e-5, atol=2e-6, err_msg=name)
    moments = [name for name in named_leaves(opt_state) if "head/norm" in name]
    assert not moments, "frozen parameters have no optimiser state"


def test_by_default_only_kernels_decay():
    optimizer = make_optimizer(OptimizerConfig(), params(), 10)
    assert {name for name, decay in optimizer.decay.items() if decay} == {"encoder/blocks/0/kernel", "head/kernel"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"frozen": ("encodr/.*",)},
            r"optimizer.frozen: rule 'encodr/\.\*' matches no parameter; nearest names: encod",
        ),
        ({"no_decay": ("head/norms/scale",)}, r"optimizer.no_decay: .*nearest names: head/norm/scale"),
        ({"learning_rate_rules": (("encoder/.*", 0.1),)}, "no rule matches head/kernel, head/norm/scale; add one"),
        ({"learning_rate_rules": (("(", 0.1),)}, r"'\(' is not a regular expression"),
        ({"frozen": (".*",)}, "leaves nothing to train"),
    ],
)
def test_faulty_rules_name_the_field_and_the_nearest_parameters(changes, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(OptimizerConfig(**changes), params(), 10)


def test_the_first_rule_that_matches_decides():
    rules = ((r"encoder/blocks/.*", 0.5), (r"encoder/.*", 0.1), (".*", 1.0))
    multipliers = make_optimizer(OptimizerConfig(learning_rate_rules=rules), params(), 10).multipliers
    assert multipliers["encoder/blocks/0/bias"] == 0.5
    assert multipliers["encoder/position_embedding"] == 0.1
    assert multipliers["head/kernel"] == 1.0


def stacked():
    rng = np.random.default_rng(1)
    each = {"kernel": jnp.asarray(rng.normal(size=(3, 2, 2)), jnp.float32), "bias": jnp.zeros((3, 2))}
    return {"blocks": {"each": each}, "head": {"kernel": jnp.ones((2, 2))}}


def moved(**changes):
    """By how much an update with gradients of one moves each layer of :func:`stacked`, and the gradients' norm."""
    config = OptimizerConfig(**{"clip_norm": None, "learning_rate": 1.0, "eps": 1e-30} | changes)
    before = stacked()
    optimizer = make_optimizer(config, before, 10)
    gradients = {name: jnp.ones_like(named_leaves(before)[name]) for name in optimizer.multipliers}
    after, _, norm = optimizer.apply(gradients, optimizer.init(before), before, jnp.asarray(0))
    return jax.tree.map(jnp.subtract, before, after)["blocks"]["each"], before["blocks"]["each"], float(norm)


def test_layers_of_a_stack_move_at_their_own_rates():
    rules = ((r"blocks/0/.*", 0.0), (r"blocks/1/.*", 0.5), (".*", 1.0))
    changes, before, _ = moved(learning_rate_rules=rules, weight_decay=0.25, no_decay=("blocks/1/kernel", ".*/bias"))
    rate = np.array([0.0, 0.5, 1.0])[:, None]
    np.testing.assert_allclose(changes["bias"], np.broadcast_to(rate, (3, 2)), rtol=1e-5)
    expected = rate[..., None] * (1.0 + np.array([0.25, 0.0, 0.25])[:, None, None] * before["kernel"])
    np.testing.assert_allclose(changes["kernel"], expected, rtol=1e-5)


def test_some_layers_of_a_stack_can_be_frozen():
    changes, before, norm = moved(frozen=("blocks/[01]/.*",), weight_decay=0.25)
    np.testing.assert_array_equal(changes["kernel"][:2], 0.0)
    np.testing.assert_array_equal(changes["bias"][:2], 0.0)
    np.testing.assert_allclose(changes["kernel"][2], 1.0 + 0.25 * before["kernel"][2], rtol=1e-5)
    np.testing.assert_allclose(norm, (4 + 2 + 4) ** 0.5, rtol=1e-6)  # the third layer's and the head's
    whole = make_optimizer(OptimizerConfig(frozen=("blocks/.*",)), stacked(), 10)
    assert set(whole.multipliers) == {"head/kernel"}
    assert not whole.moving


def test_moving_average_starts_as_the_mean_and_ends_at_its_decay():
    average = {"w": jnp.asarray(100.0)}
    for step, value in enumerate((1.0, 2.0, 6.0)):
        average = ema_update(average, {"w": jnp.asarray(value)}, 0.9, jnp.asarray(step))
    np.testing.assert_allclose(average["w"], 3.0, rtol=1e-6)
    late = ema_update({"w": jnp.asarray(1.0)}, {"w": jnp.asarray(2.0)}, 0.9, jnp.asarray(1000))
    np.testing.assert_allclose(late["w"], 1.1, rtol=1e-6)


def test_a_moving_average_without_warmup_goes_on_from_what_it_starts_with():
    average = ema_update({"w": jnp.asarray(100.0)}, {"w": jnp.asarray(0.0)}, 0.9, jnp.asarray(0), warmup=False)
    np.testing.assert_allclose(average["w"], 90.0, rtol=1e-6)


@pytest.mark.parametrize(("scaling", "rate"), [("none", 0.1), ("sqrt", 0.1 * 6**0.5), ("linear", 0.6)])
def test_the_rate_is_scaled_by_the_batch(scaling, rate):
    config = OptimizerConfig(learning_rate=0.1, learning_rate_scaling=scaling, reference_batch=4)
    assert config.scaled(24).learning_rate == pytest.approx(rate)
    assert config.scaled(24).scaled(24).learning_rate == pytest.approx(rate)  # once is enough
    assert config.scaled(4) == config


def test_scaling_needs_what_it_scales_from():
    with pytest.raises(UserError, match="learning_rate_scaling is 'sqrt', which needs reference_batch"):
        OptimizerConfig(learning_rate_scaling="sqrt")
    with pytest.raises(UserError, match="learning_rate_scaling 'squared' is unknown; known: none, sqrt, linear"):
        OptimizerConfig(learning_rate_scaling="squared", reference_batch=4)
    with pytest.raises(UserError, match="reference_batch is 0"):
        OptimizerConfig(reference_batch=0)
