"""`moec explain` and `moec bisect`: why a rule did not fire, and which one is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from moec.cli_options import BackendName, Batch, Passes, Quantize, Seq, Source, Spec, passes_of

if TYPE_CHECKING:
    from moec.ir import Graph
    from moec.passes import Pass, Rewrite


def explain(
    rule: Annotated[str, typer.Argument(help="a rule or rule set: fuse_swiglu, module:Class or path.py:Class")],
    source: Source,
    at: Annotated[str | None, typer.Option(help="only in this module, as layers.3.mlp")] = None,
    before: Annotated[
        str | None,
        typer.Option(help="on the graph before this pass or phase; default: where the pipeline has the rule"),
    ] = None,
    batch: Batch = 2,
    seq: Seq = 24,
) -> None:
    """Say where a rule fires in a model, or why it does not.

    A model's graph is taken as the rule meets it: before the pass of the default pipeline that holds the rule,
    after the whole pipeline for a rule of your own. An .ir file and a saved folder are taken as they are.
    """
    import moec
    from moec.passes import parse_pass

    chosen = parse_pass(rule)
    graph, stage = _graph_for(chosen, source, before, batch, seq)
    print(f"{stage}\n{moec.explain(cast('Rewrite', chosen), graph, at)}")  # which refuses what is no rule


def _graph_for(rule: Pass, source: str, before: str | None, batch: int, seq: int) -> tuple[Graph, str]:
    """The graph that a rule meets, and which one it is in words."""
    import moec
    from moec.ir import Graph
    from moec.passes import DeadCode, Pipeline, default_pipeline
    from moec.specs import resolve

    if Path(source).is_dir():
        return moec.load(source).graph, f"the saved graph in {source}"
    target = resolve(source, batch, seq)
    if isinstance(target.model, Graph):
        return target.model, f"the graph in {source}"
    graph = moec.trace(target.model, target.args, dynamic_shapes=target.dynamic_shapes)
    passes = default_pipeline().passes
    if before is not None:
        marker = DeadCode()
        marked = default_pipeline().insert_before(before, marker).passes
        count = next(i for i, p in enumerate(marked) if p is marker)
    else:
        count = next((i for i, p in enumerate(passes) if _holds(p, rule)), len(passes))
    where = f"before pass {passes[count].name}" if count < len(passes) else "after the default passes"
    return Pipeline(passes[:count]).run(graph)[0], f"the graph {where}"


def _holds(p: object, rule: Pass) -> bool:
    from moec.passes import RuleSet

    rules = rule.rules if isinstance(rule, RuleSet) else (rule,)
    own = p.rules if isinstance(p, RuleSet) else (p,)
    return bool(rules) and all(any(type(r) is type(o) for o in own) for r in rules)


def bisect(
    source: Spec,
    passes: Passes = None,
    quantize: Quantize = None,
    backend: BackendName = "reference",
    out: Annotated[Path | None, typer.Option(help="folder for culprit.ir, the smallest graph that shows it")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="how long to look for a smaller graph")] = 60.0,
    default: Annotated[
        bool | None,
        typer.Option("--default/--no-default", help="run the default passes too; an .ir file with --pass: not"),
    ] = None,
    batch: Batch = 2,
    seq: Seq = 24,
) -> None:
    """Find the pass, rule and application that makes a model wrong.

    Exit code 0 where nothing is wrong, 1 where there is a culprit, 2 for bad input, 3 for a crash.

    On an .ir file only the passes given by --pass run (the default ones where there are none); its inputs and weights
    come from the .safetensors file beside it, or are seeded random numbers.
    """
    import moec
    from moec.ir import Graph
    from moec.passes import Pipeline
    from moec.specs import resolve

    target = resolve(source, batch, seq)
    chosen = passes_of(passes)
    if default is None:
        default = not (isinstance(target.model, Graph) and chosen and quantize is None)
    culprit = moec.bisect(
        target.model,
        target.args,
        backend=backend,
        dynamic_shapes=target.dynamic_shapes,
        passes=chosen if default else Pipeline(tuple(chosen)),
        quantize=quantize,
        out=out,
        seconds=seconds,
    )
    print(culprit)
    raise typer.Exit(1 if culprit else 0)
