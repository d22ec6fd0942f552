"""Laws of the engine on random graphs: the meaning stays, a second run changes nothing, the input is untouched."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moec.passes import Pipeline, Rewrite, RuleSet, default_pipeline
from moec.passes.rewrite import limited
from moec.testing import graphs

QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def rules(pipeline):
    return [p for p in pipeline.passes if isinstance(p, Rewrite | RuleSet)]


@settings(QUIET, max_examples=60)
@given(graphs(), st.integers(0, 6))
def test_applications_come_in_the_same_order(graph, n):
    """A run that stops after n applications is the beginning of the run that does not."""
    pipeline = Pipeline(tuple(rules(default_pipeline())))
    with limited() as everything:
        full, _ = pipeline.run(graph)
    with limited(n) as some:
        pipeline.run(graph)
    wanted = [(a.name, a.location, a.root) for a in everything.applications[:n]]
    assert [(a.name, a.location, a.root) for a in some.applications] == wanted
    with limited(len(everything.applications)):
        assert pipeline.run(graph)[0] == full
