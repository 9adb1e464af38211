"""The verbs; no logic. Each asks a stage for an answer and prints it for a person, or as JSON."""

from __future__ import annotations

import json
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__, interrupt, show, show_plan, show_quality, verbs
from .errors import UndistilledError
from .events import subscribed
from .options import BATCH, CONTEXT, DEVICE, DTYPE, JSON, MODEL, MTP, PROVE, RANKS, RUN, SCHEME, taking

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Plan, run and prove the whole DeepSeek-R1 (and its smaller relatives) on the hardware you have.",
)


def _say_version(asked: bool) -> None:
    if asked:
        print(f"undistilled {__version__}")
        raise typer.Exit


@app.callback()
def _start(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    pass


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=1))


@app.command()
def doctor(
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine's ceilings and remember them.")
    ] = False,
    links: Annotated[
        bool, typer.Option("--links", help="Measure how fast its GPUs, or processes of its CPU, talk.")
    ] = False,
    as_json: JSON = False,
) -> None:
    """What this machine has, how fast it is, and which kernels will serve each scheme."""
    from .observe.doctor import examine

    report = examine(measure=measure, links=links, progress=show.note)
    _print_json(report) if as_json else show.doctor(report, brief=links)


@app.command()
def inspect(model: MODEL, as_json: JSON = False) -> None:
    """A model's parameters, bytes, layers and cache, from its config alone."""
    from .observe.inspect import inspect as look

    report = look(model)
    _print_json(report) if as_json else show.inspection(report)


@app.command()
@taking(RANKS)
def plan(
    model: MODEL,
    options: dict[str, Any],
    machine: Annotated[
        str, typer.Option(help="`this`, a preset's name, or a machine file; with --cluster one a node: A,B.")
    ] = "this",
    scheme: SCHEME = None,
    context: CONTEXT = None,
    batch: BATCH = 1,
    mtp: MTP = False,
    device: DEVICE = None,
    dtype: DTYPE = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the plan to this file.")] = None,
    as_json: JSON = False,
) -> None:
    """Which bytes go where, what they take at each context length, and how fast it will run. Reads no weights."""
    from .checkpoint.resolve import find
    from .parallel.places import machine_of
    from .plan.degrees import Degrees
    from .plan.plan import check_new
    from .plan.solve import Ask, solve

    if output:
        check_new(output)
    found = find(model)
    ask = Ask(scheme, context, batch, mtp, device, dtype=dtype or "auto", degrees=Degrees.of(options))
    known = machine_of(options["cluster"] or "local", machine)
    with nullcontext() if as_json else subscribed(show_plan.layouts):
        made = solve(found.name, found.config, found.spec, known, ask)
    if output:
        made.write(output)
    _print_json(made.model_dump(mode="json")) if as_json else show_plan.plan(made, output)
    if not made.fits:
        from .errors import DoesNotFit

        raise DoesNotFit(f"{made.model} in {made.scheme} does not fit {made.machine}.", made.advice)


def _engine(model: str, options: dict[str, Any]):
    interrupt.bound()  # before what takes long to import
    from .generate.engine import open_engine

    with show.loading() as progress:
        return open_engine({"model": model, **options}, progress)


@app.command()
@taking(RUN)
def generate(
    model: MODEL,
    options: dict[str, Any],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int | None, typer.Option()] = None,
    as_json: JSON = False,
) -> None:
    """Continue a text."""
    from .generate.once import generate_text
    from .schedule.request import Sampling

    engine = _engine(model, options)
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    result = generate_text(engine, prompt, sampling, on_text=None if as_json else show.stream)
    _print_json(result) if as_json else show.usage(result)


@app.command()
@taking(RUN)
def chat(
    model: MODEL,
    options: dict[str, Any],
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 1024,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.6,
) -> None:
    """Talk to a model in the terminal. Ctrl-C stops an answer; at the prompt it ends, as an empty line or Ctrl-D do."""
    from .serve.terminal import converse

    engine = _engine(model, options)
    converse(
        engine,
        system=system,
        max_tokens=max_tokens,
        temperature=temperature,
        ask=show.ask,
        on_text=show.stream,
        on_thought=show.thought,
    )


@app.command()
@taking(RUN)
def serve(
    model: MODEL,
    options: dict[str, Any],
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    api_key: Annotated[str | None, typer.Option(envvar="UNDISTILLED_API_KEY")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of context; the same as --context.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Requests at once; default 8.")] = None,
    shutdown_timeout: Annotated[float, typer.Option(help="Seconds that requests in flight get after SIGTERM.")] = 30.0,
) -> None:
    """Answer OpenAI's API over HTTP."""
    from .serve.server import serve as run

    plan_file = options["plan"]
    options |= {"model": model, "plan": str(plan_file) if plan_file else None}
    options |= {"context": max_model_len or options["context"], "batch": batch or (None if plan_file else 8)}
    raise typer.Exit(run(options, host=host, port=port, api_key=api_key, shutdown_timeout=shutdown_timeout))


@app.command()
@taking({name: said for name, said in RUN.items() if name != "context"})
def bench(
    model: MODEL,
    options: dict[str, Any],
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of each prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens that each request decodes.")] = 64,
    batch: BATCH = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Runs, of which the median is said.")] = 3,
    explain: Annotated[bool, typer.Option(help="Each kind of kernel beside the time its bytes take.")] = False,
    as_json: JSON = False,
) -> None:
    """Measure prefill and decode speed and peak memory."""
    from .observe.bench import bench as run

    if not options["plan"]:
        options |= {"context": prompt_tokens + new_tokens, "batch": batch}
    engine = _engine(model, options)
    result = run(engine, prompt_tokens, new_tokens, batch, repeat)
    if explain:
        from .observe.explain import explain as explained

        result["explain"] = explained(engine, batch)
    _print_json(result) if as_json else show.bench(result)


@app.command()
@taking(PROVE)
def prove(
    model: MODEL,
    options: dict[str, Any],
    suite: Annotated[
        bool, typer.Option("--suite", help="Ask held-out reasoning questions too; both models answer them.")
    ] = False,
    suite_task: Annotated[
        list[str] | None, typer.Option(help="A task of the suite, such as gcd; may repeat. Default: all.")
    ] = None,
    thinking: Annotated[
        bool, typer.Option("--thinking/--no-thinking", help="Whether the suite's answers may begin with reasoning.")
    ] = True,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the receipt here, and a page beside it.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Compare a plan with the original weights: divergence, accuracy, memory and speed."""
    from .prove.graded import wanted
    from .prove.receipt import check_output, write_receipt
    from .prove.receipt import prove as run

    options |= {"suite": wanted(suite, suite_task or (), thinking), "tasks": options["tasks"] or ()}
    if output:
        check_output(output)
    with show.steps() as progress:
        receipt = run(model, **options, progress=progress)
    if output:
        write_receipt(receipt, output)
    _print_json(receipt) if as_json else show_quality.receipt(receipt, output)


app.command()(verbs.train)
app.command()(verbs.quantize)
app.command()(verbs.rebalance)
app.command()(verbs.routing)
app.command()(verbs.compare)
app.command()(verbs.export)


@app.command(hidden=True)
def demo(model: Annotated[str, typer.Argument()] = "r1-nano") -> None:
    """What `make run` does."""
    from .demo import run

    run(model)


def main() -> None:
    """Run a verb; an error of ours becomes one message on stderr and its exit code, Ctrl-C exit code 130."""
    try:
        with subscribed(show.event):
            app()
    except UndistilledError as error:
        show.error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(interrupt.CODE)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while the process ends, a second one shows no traceback


if __name__ == "__main__":
    main()
