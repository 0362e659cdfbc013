"""What a compiled program's text says of it."""

from __future__ import annotations

from cast_jax.core.compiled import collective_bytes, launches

TEXT = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %part = f32[8]{0} all-gather(%x), dimensions={0}
  %fused = f32[8]{0} fusion(%part), kind=kLoop, calls=%add, metadata={op_name="jit(step)/encoder/add"}
}

%body (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  %total = f32[4]{0} all-reduce(%x), to_apply=%add
  %loop = (s32[], f32[8]) while(%tuple), condition=%test, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
}

%test (state: (s32[], f32[4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%rare (x: f32[2]) -> f32[2] {
  %moved = f32[2]{0} collective-permute(%x), source_target_pairs={{0,1}}
}

%never (x: f32[2]) -> f32[2] {
  ROOT %copy = f32[2]{0} copy(%x)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %first = f32[4]{0} all-reduce(%x), to_apply=%add
  %layers = (s32[], f32[4]) while(%t), condition=%test, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  %until = (s32[], f32[4]) while(%t), condition=%test, body=%inner
  ROOT %choice = f32[2] conditional(%p, %a, %b), branch_computations={%rare, %never}
}
"""


class Program:
    def as_text(self) -> str:
        return TEXT


def test_what_a_loop_sends_counts_as_often_as_it_turns():
    assert collective_bytes(Program()) == {
        "all-reduce": 4 * 4 * (1 + 12),
        "all-gather": 4 * 8 * (12 * 3 + 1),
        "collective-permute": 4 * 2,
    }


def test_kernels_are_counted_as_often_as_they_run():
    inner, condition = 12 * 3 + 1, 1  # of the loop of unknown length, once; the others' are not computed
    once = {"first": 1, "both branches": 2}
    assert launches(Program()) == {
        "": 12 + inner + condition + sum(once.values()),
        "jit(step)/encoder/add": inner,
    }
