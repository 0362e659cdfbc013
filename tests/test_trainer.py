"""The loop on a toy recipe: what it computes, and what it leaves on disk."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from toy_training import BATCH, DIMENSION, TRUTH, Regression, ToyLoader, digest, run_toy, toy_config

from cast_jax import trainer
from cast_jax.core.checkpoint import Checkpoints
from cast_jax.core.errors import DataError, DivergedError, UserError
from cast_jax.core.files import read_json
from cast_jax.core.logging import read_metrics
from cast_jax.core.profiling import ProfileConfig
from cast_jax.core.step import count_images
from cast_jax.trainer import finished, train

pytestmark = pytest.mark.usefixtures("toy_cache")


def lines(folder):
    return read_metrics(folder / "metrics.jsonl")


def test_it_learns_and_leaves_a_result(tmp_path):
    result = run_toy(tmp_path / "toy", 300, save_every=100, log_every=100, ema_decay=None)
    np.testing.assert_allclose(result.params["head"]["kernel"], TRUTH, atol=0.05)
    assert result.images == 300 * BATCH
    assert result.metrics["loss/total"] < 0.01
    assert result.metrics["loss/squared"] == pytest.approx(result.metrics["loss/total"], rel=1e-5)
    done = finished(tmp_path / "toy")
    assert (done["step"], done["images"], done["metrics"]) == (300, 300 * BATCH, result.metrics)
    assert [line["step"] for line in lines(tmp_path / "toy")] == [100, 200, 300]
    assert {"optimizer/gradient_norm", "optimizer/learning_rate", "speed/images_per_second"} <= set(
        lines(tmp_path / "toy")[0]
    )


def test_a_finished_step_does_nothing_and_gives_the_stored_result(tmp_path):
    first = run_toy(tmp_path / "toy", 10)
    unused = ToyLoader()
    second = train(Regression(), config=toy_config(10), folder=tmp_path / "toy", loader=unused)
    assert unused.position == 0
    assert digest(second.params) == digest(first.params)
    assert (second.metrics, second.seconds) == (first.metrics, first.seconds)
    with pytest.raises(UserError, match="was trained for 10 steps, but steps=20"):
        run_toy(tmp_path / "toy", 20)


def test_logged_values_are_means_over_the_steps_since_the_last_line(tmp_path):
    run_toy(tmp_path / "each", 6, log_every=1)
    run_toy(tmp_path / "three", 6, log_every=3)
    each = [line["loss/squared"] for line in lines(tmp_path / "each")]
    expected = [np.mean(each[:3]), np.mean(each[3:])]
    np.testing.assert_allclose([line["loss/squared"] for line in lines(tmp_path / "three")], expected, rtol=1e-6)


class Evaluation:
    """Scores that rise and fall with the number of the call; remembers what it was given."""

    def __init__(self, *scores: float):
        self.scores, self.seen = list(scores), []

    def __call__(self, params):
        self.seen.append(digest(params))
        return {"AP": self.scores[len(self.seen) - 1]}


def test_evaluations_are_recorded_and_the_best_is_exported_and_kept(tmp_path):
    exported = []
    evaluate = Evaluation(0.2, 0.5, 0.4)
    arguments = {
        "config": toy_config(12, eval_every=4, save_every=3, keep=1, best_metric="AP"),
        "folder": tmp_path / "toy",
    }

    def export(params, name):
        return exported.append((name, digest(params)))

    result = train(Regression(), loader=ToyLoader(), evaluate=evaluate, export=export, **arguments)
    first, second, third = evaluate.seen
    assert exported == [("best", first), ("best", second), ("last", third)]
    assert third == digest(result.params)
    assert result.metrics["evaluation/AP"] == 0.4
    assert {line["step"]: line["evaluation/AP"] for line in lines(tmp_path / "toy") if "evaluation/AP" in line} == {
        4: 0.2,
        8: 0.5,
        12: 0.4,
    }
    with Checkpoints(tmp_path / "toy" / "checkpoints", best_metric="AP") as checkpoints:
        assert (checkpoints.best(), checkpoints.steps()) == (8, [8, 12])


def test_the_average_is_evaluated_and_returned_on_request(tmp_path):
    evaluate = Evaluation(0.0)
    arguments = {"folder": tmp_path / "toy", "loader": ToyLoader(), "evaluate": evaluate}
    averaged = train(Regression(), config=toy_config(8, evaluate_ema=True), **arguments).params
    plain = run_toy(tmp_path / "plain", 8).params
    assert evaluate.seen == [digest(averaged)]
    assert digest(averaged) != digest(plain)


def test_the_average_goes_on_from_the_start_or_begins_with_the_first_update(tmp_path):
    start = np.full((DIMENSION, 1), 7.0, np.float32)
    found = {}
    for name, changes in {"kept": {"ema_warmup": False}, "new": {}, "plain": {"evaluate_ema": False}}.items():
        config = toy_config(1, **({"evaluate_ema": True} | changes))
        given = {"head": {"kernel": start.copy(), "bias": np.zeros(1, np.float32)}}
        arguments = {"folder": tmp_path / name, "loader": ToyLoader(), "init_params": given}
        found[name] = np.asarray(train(Regression(), config=config, **arguments).params["head"]["kernel"])
    np.testing.assert_allclose(found["new"], found["plain"])
    np.testing.assert_allclose(found["kept"], 0.9 * start + 0.1 * found["plain"], rtol=1e-6)
    assert np.abs(found["plain"] - start).min() > 0.01


def test_an_interrupted_evaluation_is_made_up_for(tmp_path):
    class PowerCutError(Exception):
        pass

    def fail(params):
        raise PowerCutError

    config = toy_config(8, best_metric="AP")
    with pytest.raises(PowerCutError):
        train(Regression(), config=config, folder=tmp_path / "toy", loader=ToyLoader(), evaluate=fail)
    assert finished(tmp_path / "toy") is None
    evaluate, unused = Evaluation(0.3), ToyLoader()
    result = train(Regression(), config=config, folder=tmp_path / "toy", loader=unused, evaluate=evaluate)
    assert unused.position == 8, "the loader was set to its place, and no batch was drawn"
    assert result.metrics["evaluation/AP"] == 0.3
    assert evaluate.seen == [digest(run_toy(tmp_path / "whole", 8).params)]


def test_what_a_finished_step_exported_comes_back_also_from_the_checkpoint_before(tmp_path, caplog):
    exported = []
    arguments = {"config": toy_config(10, save_every=8), "folder": tmp_path / "toy", "loader": ToyLoader()}
    arguments |= {"export": lambda params, name: exported.append((name, digest(params)))}
    result = train(Regression(), **arguments)
    train(Regression(), **arguments)
    (tmp_path / "toy" / "checkpoints" / "10" / "record" / "metadata").unlink()
    with caplog.at_level("INFO", logger="cast_jax"):
        again = train(Regression(), **arguments)
    assert "toy: continuing from step 8 of 10" in caplog.text
    assert digest(again.params) == digest(result.params)
    assert exported == [("last", digest(result.params))] * 3


def test_lost_metrics_do_not_keep_a_step_from_ending(tmp_path):
    run_toy(tmp_path / "toy", 10)
    for name in ("done.json", "metrics.jsonl"):
        (tmp_path / "toy" / name).unlink()
    run_toy(tmp_path / "toy", 10)
    assert finished(tmp_path / "toy")["step"] == 10


def test_the_lines_before_a_checkpoint_are_on_the_disk_before_it(tmp_path, monkeypatch):
    order = []
    save, fsync = Checkpoints.save, os.fsync
    monkeypatch.setattr(Checkpoints, "save", lambda *args: order.append("save") or save(*args))
    monkeypatch.setattr(
        os, "fsync", lambda file: order.append(Path(f"/proc/self/fd/{file}").readlink().name) or fsync(file)
    )
    run_toy(tmp_path / "toy", 10)
    known = [name for name in order if name in ("save", "metrics.jsonl")]
    assert known == ["metrics.jsonl", "save"] * 2


def test_a_damaged_result_is_named(tmp_path):
    (tmp_path / "done.json").write_text('{"step": 1')
    with pytest.raises(UserError, match=r"done\.json: is damaged, or no JSON .*; delete it to end the step again"):
        finished(tmp_path)


def test_a_non_finite_loss_stops_with_its_name_and_is_never_saved(tmp_path):
    config, folder = toy_config(14, save_every=2, log_every=1000), tmp_path / "toy"
    with pytest.raises(
        DivergedError, match=r"toy: step 6 is not finite \(loss/squared, loss/total, .*checkpoint of step 4"
    ):
        train(Regression(), config=config, folder=folder, loader=ToyLoader(poison=6))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        assert checkpoints.latest() == 4
    assert finished(folder) is None
    # The same command, with the data mended, goes on from there.
    mended = train(Regression(), config=config, folder=folder, loader=ToyLoader())
    assert digest(mended.params) == digest(run_toy(tmp_path / "whole", 14, save_every=7).params)


def test_initial_parameters_are_copied_checked_and_asked_for_once(tmp_path):
    given = {"head": {"kernel": jnp.ones((6, 1)), "bias": jnp.zeros((1,))}}
    calls = []

    def load():
        return calls.append(1) or given

    config = toy_config(4, save_every=2)
    train(Regression(), config=config, folder=tmp_path / "toy", loader=ToyLoader(), init_params=load)
    train(Regression(), config=config, folder=tmp_path / "toy", loader=ToyLoader(), init_params=load)
    assert len(calls) == 1
    np.testing.assert_array_equal(given["head"]["kernel"], np.ones((6, 1)))  # not donated to the step
    wrong = {"head": {"kernel": jnp.ones((5, 1)), "offset": jnp.zeros((1,))}}
    with pytest.raises(
        UserError, match=r"(?s)head/offset: unknown.*head/bias: missing.*kernel: shape \(5, 1\), wanted \(6, 1\)"
    ):
        train(Regression(), config=config, folder=tmp_path / "other", loader=ToyLoader(), init_params=wrong)


class Remembering(Regression):
    """Asks the moving average and a bank inside the step, as baselines do."""

    def init_bank(self):
        return {"errors": jnp.zeros((3,))}

    def loss_fn(self, params, frozen, batch, key):
        loss, metrics = super().loss_fn(params, frozen, batch, key)
        difference = params["head"]["kernel"] - frozen["ema"]["head"]["kernel"]
        metrics |= {"average/distance": (jnp.sum(difference**2), 1), "bank/sum": (jnp.sum(frozen["bank"]["errors"]), 1)}
        return loss, metrics, loss

    def update_bank(self, bank, third):
        return {"errors": jnp.roll(bank["errors"], 1).at[0].set(third)}


def test_recipes_find_the_average_and_their_bank_and_the_teacher_is_an_argument(tmp_path):
    arguments = {"config": toy_config(5, log_every=1), "folder": tmp_path / "toy", "loader": ToyLoader()}
    train(Remembering(), frozen={"offset": np.float32(2.0)}, **arguments)
    found = lines(tmp_path / "toy")
    losses = [line["loss/total"] for line in found]
    assert losses[0] > 3.0, "the offset of 2 adds about 4"
    assert [line["average/distance"] for line in found][:2] == [0.0, 0.0], "the average starts as a copy"
    assert found[4]["average/distance"] > 0.0
    expected = [sum(losses[max(step - 3, 0) : step]) for step in range(5)]
    np.testing.assert_allclose([line["bank/sum"] for line in found], expected, rtol=1e-5)
    with Checkpoints(tmp_path / "toy" / "checkpoints") as checkpoints:
        record = json.loads((checkpoints.folder / "5" / "record" / "metadata").read_text())
    assert not [name for name in record["shapes"] if "offset" in name], "the teacher is never saved"


def test_data_that_ends_and_settings_that_cannot_be_are_clear(tmp_path):
    with pytest.raises(DataError, match="toy: the data ended before step 1"):
        train(Regression(), config=toy_config(3), folder=tmp_path / "toy", loader=iter(()))
    with pytest.raises(UserError, match="log_every is 0"):
        toy_config(3, log_every=0)
    with pytest.raises(UserError, match=r"ema_decay is 1\.0; it must lie in \[0, 1\)"):
        toy_config(3, ema_decay=1.0)
    with pytest.raises(UserError, match="ema_decay is None"):
        toy_config(3, evaluate_ema=True, ema_decay=None)


def test_the_state_is_donated_and_the_teacher_and_the_batch_are_not():
    step, batch = trainer.make_step(Regression(), toy_config(3)), next(ToyLoader())
    state, frozen, batch = step.initial_state(), step.place({"offset": np.float32(0.0)}), jax.device_put(batch)
    step.compile("toy", state, frozen, batch)
    step(state, frozen, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((frozen, batch)))


def test_images_of_all_groups_are_counted():
    view = {"image": np.zeros((3, 4, 4, 3)), "labels": np.zeros((3, 2))}
    unlabelled = {
        "weak": view | {"image": np.zeros((5, 4, 4, 3)), "labels": np.zeros((5, 2))},
        "matrix": np.zeros((5, 2, 3)),
    }
    assert count_images({"labelled": {"strong": view}, "unlabelled": unlabelled}) == 8
    assert count_images({"x": np.zeros((7, 2)), "y": np.zeros(7)}) == 7


def test_updates_of_a_run_are_profiled(tmp_path, caplog):
    """The numbers do not change, and the report is of these updates."""
    plain = run_toy(tmp_path / "plain", 8)
    with caplog.at_level("INFO", logger="cast_jax"):
        profiled = run_toy(tmp_path / "toy", 8, profile=ProfileConfig(start=2, steps=3))
    assert digest(profiled.params) == digest(plain.params)
    report = read_json(tmp_path / "toy" / "profile" / "report.json")
    # Forward, the kernel's gradient, and the norm of both gradients.
    assert report["flops"] == 2 * 2 * BATCH * DIMENSION + 2 * (DIMENSION + 1)
    assert report["seconds"] > 0
    assert set(report["seconds_by_part"]) == {"other", "optimizer"}
    assert (report["memory"]["total"], report["mfu"], report["collectives"]) == (pytest.approx(3e3, rel=0.9), None, {})
    assert list((tmp_path / "toy" / "profile").rglob("*.xplane.pb"))
    assert "profile of 3 updates, in" in caplog.text
    assert "| optimizer |" in caplog.text
    assert not (tmp_path / "plain" / "profile").exists()


def test_a_profile_that_the_run_is_too_short_for(tmp_path, caplog):
    run_toy(tmp_path / "toy", 8, profile=ProfileConfig(start=7, steps=3))
    assert "profile: the run ended after 8 updates, before all were traced" in caplog.text


@pytest.mark.parametrize(("limit", "warns"), [(2**40, False), (64, True), (None, False)])
def test_the_memory_of_a_step_is_said_before_it_runs(tmp_path, caplog, monkeypatch, limit, warns):
    monkeypatch.setattr("cast_jax.core.step.memory_limit", lambda: limit)
    with caplog.at_level("INFO", logger="cast_jax"):
        run_toy(tmp_path / "toy", 1)
    known = {2**40: " of 1,024.0 GiB", 64: " of 0.0 MiB"}.get(limit, "")
    assert f"toy step: 0.0 MiB{known} a device" in caplog.text
    assert ("needs more memory than there is" in caplog.text) == warns


def test_the_operation_that_makes_a_nan_is_found_on_request(tmp_path):
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="encountered in"):
        train(Regression(), config=toy_config(9), folder=tmp_path / "toy", loader=ToyLoader(poison=3))
