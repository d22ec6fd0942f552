"""Text tests are tested: what they run, what fails, and what --accept writes."""

from pathlib import Path

import pytest

from moec.text_cases import read_cases, run_case

CASE = """
// Gate and up
// RUN: fuse_swiglu
graph(%gate: f32[T, 8], %up: f32[T, 8]) -> (%y: f32[T, 8]) {
  %0: f32[T, 8] = math.silu(%gate)
  // a comment inside
  %1: f32[T, 8] = math.mul(%0, %up)
  return %1
}
"""
RESULT = """// CHECK: graph(%gate: f32[T, 8], %up: f32[T, 8]) -> (%y: f32[T, 8]) {
// CHECK:   %0: f32[T, 8] = math.swiglu(%gate, %up)
// CHECK:   return %0
// CHECK: }
"""
OTHER = RESULT.replace("(%gate, %up)\n", "(%up, %gate)\n")
LOOKALIKE = CASE.replace("math.silu", "math.sigmoid").replace("Gate and up", "A look-alike")


def outcome(text):
    (case,) = read_cases(Path("cases.ir"), text)
    return run_case(case)


def test_a_case_that_holds():
    assert outcome(CASE + RESULT).problem is None


def test_the_expectation_may_number_and_order_values_otherwise():
    assert outcome(CASE + RESULT.replace("%0", "%result")).problem is None


def test_a_case_that_does_not_hold_shows_the_difference():
    found = outcome(CASE + OTHER)
    assert found.problem.startswith("cases.ir:1: fuse_swiglu gives another graph than expected")
    assert "-  %0: f32[T, 8] = math.swiglu(%up, %gate)\n+  %0: f32[T, 8] = math.swiglu(%gate, %up)" in found.problem
    assert found.accept == tuple(RESULT.splitlines())


def test_an_expectation_that_is_no_graph():
    assert "another graph than expected" in outcome(CASE + "// CHECK: nonsense\n").problem


def test_no_expectation():
    found = outcome(CASE)
    assert "--accept" in found.problem
    assert found.accept == tuple(RESULT.splitlines())
    assert outcome(LOOKALIKE).accept == ("// UNCHANGED",)


def test_unchanged():
    assert outcome(LOOKALIKE + "// UNCHANGED\n").problem is None
    found = outcome(CASE + "// UNCHANGED\n")
    assert "fuse_swiglu changes the graph" in found.problem
    assert found.accept == tuple(RESULT.splitlines())


def test_refused():
    assert outcome(LOOKALIKE + "// REFUSED: expected math.silu\n").problem is None
    found = outcome(LOOKALIKE + "// REFUSED: the moon\n")
    assert "no rule refuses because of 'the moon'" in found.problem
    assert "math.silu" in found.problem
    assert found.accept is None
    # a reason says why a graph stays, so it must stay
    assert "changes the graph" in outcome(CASE + "// REFUSED: fires\n").problem


def test_refused_in_one_place_and_changed_in_another():
    text = CASE.replace(
        "return %1", "%2: f32[T, 8] = math.sigmoid(%1)\n  %3: f32[T, 8] = math.mul(%2, %up)\n  return %3"
    )
    accepted = outcome(text).accept
    assert outcome(text + "\n".join(accepted)).problem is None


def test_several_passes_run_in_order():
    text = CASE.replace("fuse_swiglu", "fuse_swiglu{max=0}, dead_code") + "// UNCHANGED\n"
    assert outcome(text).problem is None
    two_lines = CASE.replace("RUN: fuse_swiglu", "RUN: dead_code\n// RUN: fuse_swiglu") + RESULT
    assert outcome(two_lines).problem is None


def test_an_unknown_pass():
    assert "did you mean fuse_swiglu" in outcome(CASE.replace("RUN: fuse_swiglu", "RUN: fuse_swigle")).problem


def test_an_error_that_is_expected():
    text = CASE.replace("fuse_swiglu", "quantize_weights")
    assert outcome(text + "// ERROR: coverage\n").problem is not None  # nothing to quantise is no error
    linear = """
// RUN: quantize_weights{quantization={keep=["m"], min_coverage=1.0}}
graph(%x: f32[T, 8]) -> (%y: f32[T, 8]) {
  weight @w: f32[8, 8]
  %0: f32[T, 8] = linear.linear(%x, @w) loc("m" "m.py":1)
  return %0
}
"""
    assert outcome(linear + "// ERROR: coverage\n").problem is None
    assert "does not say 'the moon'" in outcome(linear + "// ERROR: the moon\n").problem
    assert "fails" in outcome(linear + "// UNCHANGED\n").problem


WRONG = """
from dataclasses import dataclass
from moec.passes import Rewrite

@dataclass(frozen=True)
class Wrong(Rewrite):
    def pattern(self, p, gate, up):
        return p.mul(p.silu(gate), up)

    def replace(self, b, m):
        return b.mul(b.swiglu(m.gate, m.up), 1.01)
"""


def test_users_own_rules_and_wrong_results_are_never_accepted(tmp_path):
    (tmp_path / "rules.py").write_text(WRONG)
    found = outcome(CASE.replace("RUN: fuse_swiglu", f"RUN: {tmp_path}/rules.py:Wrong"))
    assert "changes the meaning" in found.problem
    assert found.accept is None
    tolerated = CASE.replace("RUN: fuse_swiglu", f"TOLERANCE: 0.02 (it rounds)\n// RUN: {tmp_path}/rules.py:Wrong")
    assert "the case expects nothing" in outcome(tolerated).problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CASE.replace("RUN: fuse_swiglu", "an explanation"), "cases.ir:1: the case has no // RUN: line"),
        (CASE + "// CHEKC: x\n", "cases.ir:10: unknown line 'CHEKC'; did you mean CHECK?"),
        (CASE + "// NOTHING: x\n", "unknown line 'NOTHING'; one of RUN"),
        (CASE + RESULT + "// UNCHANGED\n", "both CHECK and UNCHANGED"),
        (CASE + RESULT + "// ERROR: x\n", "ERROR has no result to CHECK"),
        (CASE + "// UNCHANGED: really\n", "cases.ir:10: write // UNCHANGED"),
        (CASE + "// REFUSED:\n", "cases.ir:10: write // REFUSED: …"),
        (CASE + "// TOLERANCE: much\n", "cases.ir:10: write // TOLERANCE: 0.05"),
    ],
)
def test_malformed_cases(text, message):
    with pytest.raises(AssertionError) as e:
        outcome(text)
    assert message in str(e.value)


def test_a_graph_that_does_not_parse():
    found = outcome(CASE.replace("math.silu", "math.sili"))
    assert found.problem.startswith("cases.ir:1: [syntax] line 5, column 3: unknown op 'math.sili'")


def test_cases_are_separated_and_named():
    first, second = read_cases(Path("x.ir"), CASE + RESULT + "\n// -----\n" + LOOKALIKE + "// UNCHANGED\n")
    assert (first.title, second.title) == ("Gate and up", "A look-alike")
    assert second.where == "x.ir:16"
    assert read_cases(Path("x.ir"), "\n// -----\n\n") == []


# -- through pytest -------------------------------------------------------------------------------


def run(pytester, text, *options):
    folder = pytester.mkdir("texts")
    (folder / "swiglu.ir").write_text(text)
    return again(pytester, *options)


def again(pytester, *options):
    pytester.makeini("[pytest]")  # no configuration from around
    return pytester.runpytest_inprocess("-p", "moec.text_tests", "-p", "no:hypothesispytest", *options)


def test_files_in_texts_are_collected(pytester):
    result = run(pytester, CASE + RESULT + "// -----\n" + CASE + OTHER, "-v")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*swiglu.ir::Gate_and_up PASSED*", "*swiglu.ir::Gate_and_up_2 FAILED*"])
    result.stdout.fnmatch_lines(["*swiglu.ir:15: fuse_swiglu gives another graph than expected*"])
    result.stdout.no_fnmatch_line("*Traceback*")


def test_other_folders_are_not_collected(pytester):
    (pytester.mkdir("graphs") / "some.ir").write_text(CASE)
    assert again(pytester).ret == pytest.ExitCode.NO_TESTS_COLLECTED
    assert again(pytester, "-o", "moec_texts=graphs").ret == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize("text", ["", "// -----\n", CASE.replace("RUN:", "RAN:")])
def test_empty_and_malformed_files_are_errors(pytester, text):
    run(pytester, text).assert_outcomes(errors=1)


def test_accept_writes_expectations_only(pytester):
    text = (
        "// A file.\n"
        + CASE
        + "\n// -----\n"
        + CASE.replace("Gate and up", "Outdated")
        + "// before\n"
        + OTHER
        + "// after\n// -----\n"
        + LOOKALIKE
    )
    run(pytester, text).assert_outcomes(failed=3)
    assert (pytester.path / "texts/swiglu.ir").read_text() == text
    again(pytester, "--accept").assert_outcomes(passed=3)
    accepted = (pytester.path / "texts/swiglu.ir").read_text()
    assert accepted == (
        "// A file.\n"
        + CASE
        + RESULT
        + "\n// -----\n"
        + CASE.replace("Gate and up", "Outdated")
        + "// before\n"
        + RESULT
        + "// after\n// -----\n"
        + LOOKALIKE
        + "// UNCHANGED\n"
    )
    again(pytester).assert_outcomes(passed=3)
    again(pytester, "--accept").assert_outcomes(passed=3)
    assert (pytester.path / "texts/swiglu.ir").read_text() == accepted


def test_accept_leaves_what_is_wrong(pytester):
    (pytester.path / "rules.py").write_text(WRONG)
    text = CASE.replace("RUN: fuse_swiglu", 'RUN: "../rules.py":Wrong')
    run(pytester, text, "--accept").assert_outcomes(failed=1)
    assert (pytester.path / "texts/swiglu.ir").read_text() == text
