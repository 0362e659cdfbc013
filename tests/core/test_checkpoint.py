"""What is saved comes back bit by bit; what is damaged is said to be, and does not end the run."""

from __future__ import annotations

import logging
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cast_jax.core.checkpoint import Checkpoints, TrainState
from cast_jax.core.errors import UserError
from cast_jax.core.sharding import make_mesh, replicated


def make_state(step: int, *, features: int = 5, ema: bool = True) -> TrainState:
    kernel = jax.random.normal(jax.random.key(step), (4, features))
    params = {"head": {"kernel": kernel}}
    moments = {"count": jnp.asarray(step, jnp.int32), "mu": {"head/kernel": kernel.astype(jnp.bfloat16)}}
    state = TrainState(jnp.asarray(step, jnp.int32), params, moments, ema=params if ema else None)
    return jax.device_put(state, replicated(make_mesh({"data": -1}, jax.devices()[:1])))


def assert_equal(one: TrainState, other: TrainState) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, other)


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(make_state(step), {"position": step}, {"images": 8 * step})


def damage(folder) -> None:
    """Cuts every array file of a checkpoint in half."""
    for path in (folder / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_everything_comes_back(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 3)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(make_state(0))
    assert_equal(restored.state, make_state(3))
    assert restored.loader_state == {"position": 3}
    assert restored.metadata == {"images": 24}


def test_a_loader_state_may_be_bytes_and_there_may_be_no_average(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(1, ema=False), b"\x00\xffgrain", {})
        restored = checkpoints.restore(make_state(0, ema=False))
    assert restored.loader_state == b"\x00\xffgrain"
    assert_equal(restored.state, make_state(1, ema=False))


def test_nothing_there_is_none(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        assert checkpoints.best() is None
        assert checkpoints.restore(make_state(0)) is None


def test_the_newest_and_the_best_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2, best_metric="AP") as checkpoints:
        for step, score in enumerate((0.1, 0.7, 0.3, float("nan"), 0.2), start=1):
            save(checkpoints, step)
            checkpoints.record_evaluation(step, {"AP": score})
        assert checkpoints.best() == 2
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["2", "4", "5"]


def test_a_process_that_fails_removes_nothing_which_takes_all_processes(tmp_path):
    def fail() -> None:
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            save(checkpoints, 1, 2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.steps() == [1, 2]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.steps() == [2]


def test_a_donating_step_may_follow_a_save_at_once(tmp_path):
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0)
    jax.block_until_ready(
        overwrite(make_state(1, features=100_000, ema=False))
    )  # compiled: it now follows within microseconds
    with Checkpoints(tmp_path) as checkpoints:
        state = make_state(1, features=100_000, ema=False)
        checkpoints.save(state, None, {})
        jax.block_until_ready(overwrite(state))
        restored = checkpoints.restore(make_state(0, features=100_000, ema=False))
    assert_equal(restored.state, make_state(1, features=100_000, ema=False))


def test_evaluations_beyond_a_rewound_step_are_forgotten(tmp_path):
    with Checkpoints(tmp_path, best_metric="AP") as checkpoints:
        save(checkpoints, 2)
        for step in (1, 2, 3):
            checkpoints.record_evaluation(step, {"AP": float(step)})
        checkpoints.restore(make_state(0))
        assert checkpoints.evaluations() == {1: {"AP": 1.0}, 2: {"AP": 2.0}}
        with pytest.raises(UserError, match="best_metric 'AP' is not evaluated; nearest names: AP50"):
            checkpoints.record_evaluation(3, {"AP50": 1.0})


def replace_in(path, old: bytes, new: bytes) -> None:
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))


HARM = {
    "arrays cut in half": damage,
    "record cut in half": lambda folder: (folder / "record" / "metadata").write_text('{"loa'),
    "another name in the record": lambda folder: replace_in(folder / "record" / "metadata", b"kernel", b"kerneL"),
    "another place in the record": lambda folder: replace_in(folder / "record" / "metadata", b": 2}", b": 3}"),
    "no arrays": lambda folder: shutil.rmtree(folder / "state"),
    "half of the files": lambda folder: [path.unlink() for path in sorted(folder.rglob("*"))[::2] if path.is_file()],
    "nothing but the folder": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_can_be_saved_again(tmp_path, caplog, harm):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, 2)
    HARM[harm](tmp_path / "2")
    with Checkpoints(tmp_path) as checkpoints, caplog.at_level(logging.WARNING, "cast_jax"):
        restored = checkpoints.restore(make_state(0))
        assert_equal(restored.state, make_state(1))
        assert restored.loader_state == {"position": 1}
        assert "checkpoint 2" in caplog.text
        assert "continuing from checkpoint 1 instead" in caplog.text
        save(checkpoints, 2)
        assert_equal(checkpoints.restore(make_state(0)).state, make_state(2))


@pytest.mark.parametrize("harm", ["a page of zeros", "a bit"])
def test_damage_that_orbax_does_not_see(tmp_path, caplog, harm):
    states = [make_state(step, features=20_000, ema=False) for step in range(3)]
    with Checkpoints(tmp_path) as checkpoints:
        for state in states[1:]:
            checkpoints.save(state, None, {})
    file = max((tmp_path / "2" / "state").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = bytes(4096) if harm == "a page of zeros" else [content[middle] ^ 1]
    if harm == "a bit":
        content[middle + 1 :] = file.read_bytes()[middle + 1 :]
    file.write_bytes(content)
    with Checkpoints(tmp_path) as checkpoints, caplog.at_level(logging.WARNING, "cast_jax"):
        assert_equal(checkpoints.restore(states[0]).state, states[1])
    assert "checkpoint 2" in caplog.text
    assert "continuing from checkpoint 1 instead" in caplog.text


def test_damaged_evaluations_are_named(tmp_path):
    (tmp_path / "evaluations.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluations\.json: is damaged, or no JSON .*; delete it to go on without"):
        Checkpoints(tmp_path)


def test_a_save_that_was_cut_off_is_not_seen(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, 2)
    (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        save(checkpoints, 2)
        assert checkpoints.steps() == [1, 2]


def test_only_damaged_checkpoints_stop_the_run_rather_than_start_anew(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
    damage(tmp_path / "1")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        checkpoints.restore(make_state(0))
    assert (tmp_path / "1").exists()


def test_another_model_is_an_error_that_lists_the_differences(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
        with pytest.raises(UserError, match=r"params/head/kernel: saved float32\[4, 5\], now float32\[4, 7\]"):
            checkpoints.restore(make_state(0, features=7))
        with pytest.raises(UserError, match=r"ema/head/kernel: saved but not in this model"):
            checkpoints.restore(make_state(0, ema=False))
        assert checkpoints.steps() == [1]


def test_saving_a_tiny_model_is_quick_and_silent(tmp_path, recwarn):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
        begin = time.process_time()
        save(checkpoints, 2, 3)
        assert (time.process_time() - begin) / 2 < 1.0
        checkpoints.restore(make_state(0))
    assert not [str(warning.message) for warning in recwarn if issubclass(warning.category, DeprecationWarning)]
