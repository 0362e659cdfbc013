"""A resumed run's files read as if it had never stopped."""

from __future__ import annotations

import json
import logging

from cast_jax.core.logging import MetricsWriter, environment, read_metrics, setup_logging
from cast_jax.core.progress import Progress, Stopwatch, clock


def steps(path):
    return [line["step"] for line in read_metrics(path)]


def test_lines_beyond_the_restored_step_and_half_lines_are_removed(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for step in (10, 20, 30):
        writer.write(step, {"loss/total": 1.0 / step})
    writer.close()
    with writer.path.open("a") as file:
        file.write('{"step": 40, "los')
    resumed = MetricsWriter(tmp_path, step=20, tensorboard=False)
    assert steps(resumed.path) == [10, 20]
    resumed.write(30, {"loss/total": 0.5})
    resumed.close()
    assert read_metrics(resumed.path)[-1] == {"step": 30, "loss/total": 0.5}
    assert steps(resumed.path) == [10, 20, 30]


def test_an_evaluation_that_is_repeated_after_a_restart_is_listed_once(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(10, {"loss/total": 1.0})
    writer.write(10, {"evaluation/AP": 0.3})
    writer.close()
    resumed = MetricsWriter(tmp_path, step=10, tensorboard=False)
    resumed.write(10, {"evaluation/AP": 0.3})
    resumed.close()
    assert steps(resumed.path) == [10, 10]


def test_tensorboard_events_are_written_and_purged_from_the_restored_step(tmp_path):
    writer = MetricsWriter(tmp_path, step=7)
    writer.write(8, {"loss/total": 1.0})
    writer.close()
    (events,) = tmp_path.glob("events.out.tfevents.*")
    content = events.read_bytes()
    assert b"loss/total" in content
    # A session log with status START (field 5, value 1) at step 8 tells TensorBoard to drop older events from there.
    assert b"\x10\x08\x3a\x02\x08\x01" in content


def test_a_run_that_begins_anew_beside_earlier_events_has_them_forgotten(tmp_path):
    for earlier in (False, True):
        writer = MetricsWriter(tmp_path)
        writer.write(1, {"loss/total": 1.0})
        writer.close()
        (events,) = set(tmp_path.glob("events.out.tfevents.*")) - {tmp_path / "events.out.tfevents.0"}
        assert (b"\x10\x01\x3a\x02\x08\x01" in events.read_bytes()) == earlier
        events.rename(tmp_path / "events.out.tfevents.0")


def test_lines_that_a_power_cut_left_damaged_cost_only_themselves(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    good = [f'{{"step": {step}, "loss/total": 1.0}}\n'.encode() for step in (1, 2, 3)]
    path.write_bytes(good[0] + b"\0" * 20 + good[1] + b"\xff\n[]\n" + good[2])
    assert steps(path) == [1, 3]
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        f"line {number} is damaged and left out" for number in (2, 3, 4)
    ]


def test_events_are_in_the_file_though_the_process_ends_at_once(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss/total": 1.0})
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"loss/total" in events.read_bytes()


def test_no_file_means_no_lines(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_the_log_goes_to_the_file_in_full_and_to_the_console_from_its_level(tmp_path, capsys):
    try:
        setup_logging(tmp_path / "deeper" / "log.txt")
        setup_logging(tmp_path / "deeper" / "log.txt")
        logging.getLogger("cast_jax.trainer").info("hello")
        logging.getLogger("cast_jax.trainer").debug("details")
        assert capsys.readouterr().err == "hello\n"
        lines = (tmp_path / "deeper" / "log.txt").read_text().splitlines()
        assert [line.split(" ", 2)[2] for line in lines] == ["INFO    hello", "DEBUG   details"]
    finally:
        logger = logging.getLogger("cast_jax")
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
        logger.propagate = True


def test_what_jax_tells_of_itself_is_shown_to_those_who_ask():
    of_jax = logging.getLogger("jax")
    before = of_jax.level
    try:
        for level, shown in ((logging.NOTSET, False), (logging.INFO, True)):
            of_jax.setLevel(level)
            setup_logging()
            assert logging.getLogger("jax._src.compilation_cache").isEnabledFor(logging.INFO) == shown
    finally:
        of_jax.setLevel(before)


def test_the_environment_is_json_and_names_versions():
    found = json.loads(json.dumps(environment()))
    assert found["packages"]["jax"]
    assert found["packages"]["numpy"]
    assert found["cpu_count"] >= 1
    assert found["device_count"] >= 1


def test_the_plain_line_says_how_far_and_how_long():
    progress = Progress("distill", 1000, start=100, terminal=False)
    progress.show({"loss": 1.23456})
    # 300 of the 900 remaining steps took a minute: two minutes for the other 600.
    assert progress.line(400, 60.0) == "distill  40 %  step 400/1000  loss 1.235  ETA 0:02:00"
    assert clock(3_725.4) == "1:02:05"


def test_plain_lines_come_no_more_often_than_asked(caplog):
    with caplog.at_level(logging.INFO, "cast_jax"):
        with Progress("a", 10, every=3600, terminal=False) as progress:
            progress.update(5)
        assert not caplog.messages
        with Progress("a", 10, every=0, terminal=False) as progress:
            progress.update(5)
        assert caplog.messages == ["a  50 %  step 5/10"]


def test_what_the_first_step_took_is_not_expected_of_the_others(monkeypatch, caplog):
    times = iter([0.0, 100.0, 102.0])
    monkeypatch.setattr("cast_jax.core.progress.time.monotonic", lambda: next(times))
    with caplog.at_level(logging.INFO, "cast_jax"):
        progress = Progress("a", 10, every=0, terminal=False)
        progress.update(1)
        progress.update(2)
    assert caplog.messages == ["a  10 %  step 1/10", "a  20 %  step 2/10  ETA 0:00:16"]


def test_a_stopwatch_carries_its_seconds_over():
    watch = Stopwatch({"total": 100.0, "save": 10.0})
    with watch.measure("save"):
        pass
    with watch.measure("evaluate"):
        pass
    seconds = watch.read()
    assert 100.0 <= seconds["total"] < 101.0
    assert 10.0 <= seconds["save"] < 10.5
    assert 0.0 <= seconds["evaluate"] < 0.5
