"""The command line: ``tad-plugin VERB ...``. Each verb calls one function; flags are fields of settings classes."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tad_plugin import __version__
from tad_plugin.errors import TadPluginError
from tad_plugin.upstream import cli as checkouts
from tad_plugin.utils.machine import named_memory_error
from tad_plugin.utils.workers import Terminated, stoppable
from tad_plugin.utils.write_errors import named_write_error

__all__ = ["main"]

ABOUT = """Dataset distillation on imperfect real data.

  tad-plugin audit --dataset folder:photos --out runs/audit --fix copy --to photos-corrected
  tad-plugin compare --dataset digits --noise symmetric:0.4 --ipc 1,10 --arms clean,noisy,tad --seeds 3 --out runs/first
  tad-plugin distill --dataset digits --noise symmetric:0.4 --arm tad --out runs/one
  tad-plugin experts --dataset digits --noise symmetric:0.4 --arm tad --experts 5 --epochs 20 --out runs/experts
  tad-plugin evaluate runs/one --eval_network mlp,convnet
  tad-plugin influence runs/first/iwd/ipc10/seed0
  tad-plugin reproduce reproduce/tad_cifar10.yaml --size smoke
  tad-plugin report runs/tad_cifar10-smoke
  tad-plugin export runs/one --to distilled
  tad-plugin methods
  tad-plugin patch apply dm ../DatasetCondensation
  tad-plugin run --upstream ../DatasetCondensation -- main_DM.py --ipc 10 --tad_method tad

Every verb except methods, patch and run takes --config FILE.yaml; flags after it override the file.
The same command resumes a run that was interrupted."""


SEVERAL = {"ipc", "seed"}
"""Settings of which a comparison takes several values, with flags of its own."""


def _parser() -> Any:
    from tad_plugin.experiments.parser import parser_class

    ArgumentParser = parser_class()
    from argparse import RawDescriptionHelpFormatter

    from jsonargparse import ActionConfigFile, DefaultHelpFormatter

    from tad_plugin.experiments.arms import ARMS
    from tad_plugin.experiments.config import RunConfig

    class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Keeps line breaks in descriptions and shows defaults."""

    arms = "".join(f"\n  {name:18} {arm.about}" for name, arm in ARMS.items())
    parser = ArgumentParser(prog="tad-plugin", description=ABOUT, formatter_class=Formatter)
    parser.add_argument("--version", action="version", version=f"tad_plugin {__version__}")
    verbs = parser.add_subcommands(required=True, dest="verb")

    def verb(name: str, arguments: str, about: str, skip: set[str] | None = None, run: bool = True) -> Any:
        usage = f"tad-plugin {name} {arguments}".rstrip()
        sub = ArgumentParser(usage=usage, description=about, formatter_class=Formatter)
        if arguments not in ("", "..."):
            sub.add_argument("--config", action=ActionConfigFile, help="YAML file of any of these settings")
        if run:
            sub.add_class_arguments(RunConfig, as_group=False, skip=skip or set())
        verbs.add_subcommand(name, sub, help=about.splitlines()[0])
        return sub

    one = verb(
        "distill",
        "--arm ARM --out FOLDER [options]",
        f"Distil one synthetic set.\n\nArms (or any registered method, several joined by '+'):{arms}",
    )
    one.add_argument("--arm", type=str, default="noisy", help="labels and method, see above")
    one.add_argument("--out", type=str, required=True, help="run folder")
    one.add_argument("--overwrite", type=bool, default=False, help="start over and remove an earlier run in the folder")
    one.add_argument(
        "--shared", type=str, default="", help="folder of decisions and experts that runs share (by default: none)"
    )

    from tad_plugin.distill.experts.trainer import ExpertConfig
    from tad_plugin.experiments.expert_run import NOT_FOR_EXPERTS
    from tad_plugin.experiments.flags import NOT_FOR_EVALUATION

    teach = verb(
        "experts",
        "--arm ARM --out FOLDER [options]",
        f"Train networks on the real data and keep their trajectories, for mtt and datm.\n\nArms:{arms}",
        NOT_FOR_EXPERTS,
    )
    teach.add_class_arguments(ExpertConfig, as_group=False, skip={"width"})
    teach.add_argument("--arm", type=str, default="noisy", help="labels and method, see above")
    teach.add_argument("--out", type=str, required=True, help="run folder, which is the replay buffer")
    teach.add_argument("--jobs", type=int, default=1, help="experts trained side by side")
    teach.add_argument("--overwrite", type=bool, default=False, help="start over and remove the buffer in the folder")

    check = verb(
        "evaluate",
        "RUN [options]",
        "Train fresh networks on a synthetic set and test them on the real test images.",
        NOT_FOR_EVALUATION,
    )
    check.add_argument("synthetic", type=str, help="run folder, or its synthetic.safetensors")
    check.add_argument("--out", type=str, default="", help="JSON file for the result")

    many = verb(
        "compare",
        "--arms A,B --out FOLDER [options]",
        f"Run several arms x seeds side by side; table, plots and page.\n\nArms:{arms}",
        SEVERAL,
    )
    many.add_argument("--ipc", type=str, default="10", help="images per class, one or several: 1,10")
    many.add_argument("--arms", type=str, default="clean,noisy,tad", help="arms joined by commas")
    many.add_argument("--seeds", type=str, default="3", help="how many (5), or which (7,8,9; one alone: 7,)")
    many.add_argument(
        "--jobs",
        type=int | None,
        default=None,
        help="runs side by side (by default: one here, and with ray as many as the cluster has room for)",
    )
    many.add_argument("--launcher", type=str, default="local", help='"local", or "ray" for a cluster')
    many.add_argument(
        "--shared", type=str, default="", help="folder of decisions and experts that runs share (OUT/shared)"
    )
    many.add_argument("--out", type=str, required=True, help="folder for runs, table, pictures and page")
    many.add_argument("--overwrite", type=bool, default=False, help="start over and remove earlier runs in the folder")
    many.add_argument("--pictures", type=bool, default=True, help="draw the pictures and the HTML page")

    who = verb(
        "influence",
        "FOLDER [options]",
        "The most helpful and most harmful real samples of a run that scored influences: a table and a picture.",
        run=False,
    )
    who.add_argument(
        "folder", type=str, help="run folder (--out of distill, or OUT/ARM/ipcN/seedS) of an arm such as iwd"
    )
    who.add_argument("--top", type=int, default=10, help="samples of each kind and class")
    who.add_argument("--out", type=str, default="", help="output folder; the run folder by default")

    from tad_plugin.experiments.grid import verbs as grids

    grids.add_reproduce_arguments(verb("reproduce", "GRID.yaml [options]", grids.ABOUT["reproduce"], run=False))
    grids.add_report_arguments(verb("report", "FOLDER [options]", grids.ABOUT["report"], run=False))
    take = verb(
        "export",
        "RUN --to FOLDER [options]",
        "Write the synthetic set of a run for use without this package, with a load.py that trains on it.",
        run=False,
    )
    take.add_argument("run", type=str, help="run folder, or the file of a synthetic set")
    take.add_argument("--to", type=str, required=True, help="new folder for the export")
    take.add_argument("--format", type=str, default="png", help="png, npz, pt, safetensors or dd-ranking")
    take.add_argument("--overwrite", type=bool, default=False, help="replace an earlier export in the folder")

    from tad_plugin.experiments.audit import verbs as audits

    audits.add_audit_arguments(
        verb("audit", "--dataset NAME --out FOLDER [options]", audits.ABOUT, audits.NOT_FOR_AUDIT)
    )
    about = "List the registered methods with their settings and the bundled baselines, or explain one method."
    verb("methods", "[METHOD]", about, run=False).add_argument("method", type=str, nargs="?", default="")
    for name, about in checkouts.ABOUT.items():
        verb(name, "...", about, run=False)  # only for the list of verbs: main() passes them on before it parses
    return parser


def _run_config(values: Any, skip: Collection[str] = ()) -> Any:
    import dataclasses

    from tad_plugin.experiments.config import RunConfig

    names = {f.name for f in dataclasses.fields(RunConfig)} - set(skip)
    return RunConfig.from_flags({k: v for k, v in values.as_dict().items() if k in names})


def _distill(values: Any) -> None:
    from tad_plugin.experiments.doubts import doubt_lines
    from tad_plugin.experiments.flags import check_distill_flags
    from tad_plugin.experiments.report.tables import summarise, text_table
    from tad_plugin.experiments.run import run

    options = {"overwrite": values.overwrite, "shared": values.shared or None}
    config = _run_config(values)
    check_distill_flags(config, [values.arm], values.shared)
    results = run(config, values.arm, values.out, progress=True, **options)
    print("\n".join([text_table(summarise([results])), *doubt_lines([results])]))
    print(f"\nsynthetic set: {Path(values.out) / 'synthetic.safetensors'}")


def _experts(values: Any) -> None:
    import dataclasses

    from tad_plugin.distill.experts.trainer import ExpertConfig
    from tad_plugin.experiments.expert_run import run_experts
    from tad_plugin.experiments.flags import check_expert_flags

    given, names = values.as_dict(), {f.name for f in dataclasses.fields(ExpertConfig)} - {"width"}
    config = ExpertConfig(**{k: v for k, v in given.items() if k in names})
    options = {"overwrite": values.overwrite, "jobs": values.jobs}
    check_expert_flags(_run_config(values), config, values.arm)
    found = run_experts(_run_config(values), config, values.arm, values.out, progress=True, **options)
    own, kind = found["accuracy"]["experts"], "test accuracy"
    if own is None and (held := found["heldout"]):
        own, kind = held["experts"], f"accuracy on {held['samples']} held-out images by their {held['labels']} labels"
    shown = ", ".join(f"{accuracy:.1f}" for accuracy in own) if own else "not known (no test images)"
    print(f"{found['experts']} experts, {found['epochs']} epochs, {found['seconds']:.0f} s; {kind}, %: {shown}")
    print(f"replay buffer: {values.out}")


def _evaluate(values: Any) -> None:
    from tad_plugin.data.synthetic import SyntheticSet
    from tad_plugin.evaluate import evaluate
    from tad_plugin.experiments.doubts import at_chance
    from tad_plugin.experiments.evaluated import evaluated
    from tad_plugin.experiments.flags import check_evaluate_flags
    from tad_plugin.experiments.loading import load_test
    from tad_plugin.experiments.plan import resolve
    from tad_plugin.experiments.strict_json import strict
    from tad_plugin.nn.passes import memory_budget
    from tad_plugin.utils.files import atomic_write
    from tad_plugin.utils.seeds import seeded_generator

    config, file = evaluated(_run_config(values), values.synthetic)
    plan = resolve(config, "noisy")  # evaluation is the same for all arms
    synthetic = SyntheticSet.load(file, device=plan.device)
    check_evaluate_flags(config, synthetic.learning_rate)
    splits = load_test(plan, synthetic, file)
    found = {}
    for network in plan.evaluation.networks:
        with memory_budget(plan.memory_budget):
            result = evaluate(
                synthetic,
                (splits.test_images, splits.test_labels),
                plan.evaluation,
                preprocessing=splits.preprocessing,
                network=network,
                generator=seeded_generator(plan.seed),
            )
        found[network] = {"mean": result.mean, "std": result.std, "accuracies": list(result.accuracies)}
        print(f"{network:12} {result.mean:6.2f} +- {result.std:.2f} %  ({len(result.accuracies)} networks)")
        if doubt := at_chance(network, result.accuracies, splits.test_labels):
            print(f"doubtful: {doubt}")
    if values.out:
        atomic_write(values.out, json.dumps(strict(found), indent=1, allow_nan=False) + "\n")


def _compare(values: Any) -> int:
    import dataclasses

    from tad_plugin.experiments import compare as c
    from tad_plugin.experiments.doubts import doubt_lines
    from tad_plugin.experiments.flags import check_distill_flags, check_picture_packages
    from tad_plugin.experiments.launch import Failure
    from tad_plugin.experiments.report.page import html_page
    from tad_plugin.experiments.report.tables import markdown_table, summarise, text_table
    from tad_plugin.utils.files import atomic_write
    from tad_plugin.utils.write_errors import check_path

    config = _run_config(values, skip=SEVERAL)
    arms = [a.strip() for a in values.arms.split(",") if a.strip()]
    seeds, ipcs, out = c.parse_seeds(values.seeds), c.parse_numbers(values.ipc, "ipc"), Path(values.out)
    check_path(values.out, "--out")
    c.tasks_of(config, arms, seeds, ipcs, out)  # mistakes in arms and settings come first
    check_distill_flags(dataclasses.replace(config, ipc=ipcs[0]), arms, values.shared)
    if values.pictures:
        check_picture_packages()
    failures: list[Failure] = []
    results = c.compare(
        config,
        arms=arms,
        seeds=seeds,
        ipcs=ipcs,
        out=out,
        jobs=values.jobs,
        launcher=values.launcher,
        overwrite=values.overwrite,
        failures=failures,
        shared=values.shared or None,
    )
    if results:
        rows, odd = summarise(results), doubt_lines(results)
        table = "\n".join([text_table(rows), *odd])
        atomic_write(out / "table.txt", table + "\n")
        atomic_write(out / "table.md", "\n\n".join([markdown_table(rows), *odd]) + "\n")
        print(table)
        written = "results.json, table.txt, table.md"
        if values.pictures:
            from tad_plugin.experiments.report.pictures import draw_comparison, run_links

            tasks = c.tasks_of(config, arms, seeds, ipcs, out)
            page = html_page(results, draw_comparison(results, tasks, out), runs=run_links(tasks, out))
            atomic_write(out / "index.html", page)
            written += ", index.html, pictures/"
        print(f"\n{out}: {written}")
    if not failures:
        return 0
    for failure in failures:
        print(f"tad-plugin: failed: {failure}", file=sys.stderr)
    count, report_file = f"{len(failures)} of {len(results) + len(failures)} runs", out / "failures.txt"
    do = "The other results are kept, and the same command tries these runs again"
    print(f"tad-plugin: {count} failed; tracebacks in {report_file}. {do}.", file=sys.stderr)
    return 1


def _influence(values: Any) -> None:
    from tad_plugin.experiments.flags import check_picture_packages
    from tad_plugin.experiments.report.influence import report_influence

    check_picture_packages(page=False)
    for path in report_influence(values.folder, values.out, top=values.top):
        print(path)


def _methods(values: Any) -> None:
    from tad_plugin.experiments.help_text import methods_text

    print(methods_text(values.method))


def _later(module: str, name: str) -> Callable[[Any], int | None]:
    """A verb whose module is imported when it is called."""

    def call(values: Any) -> int | None:
        found: int | None = getattr(import_module(module), name)(values)
        return found

    return call


VERBS: dict[str, Callable[[Any], int | None]] = {
    "distill": _distill,
    "experts": _experts,
    "evaluate": _evaluate,
    "compare": _compare,
    "influence": _influence,
    "audit": _later("tad_plugin.experiments.audit.verbs", "audit_verb"),
    "reproduce": _later("tad_plugin.experiments.grid.verbs", "reproduce"),
    "report": _later("tad_plugin.experiments.grid.verbs", "report"),
    "export": _later("tad_plugin.experiments.export_run", "export_verb"),
    "methods": _methods,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``tad-plugin``.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        The exit status: 0; 1 if some runs of a comparison failed; 2 after an error that the user can correct; 130 after
        Ctrl-C; 143 after SIGTERM.
    """
    given = list(argv) if argv is not None else sys.argv[1:]
    try:
        with stoppable(signal.SIGINT, signal.SIGTERM):
            return _run(given)
    except TadPluginError as error:
        print(f"tad-plugin: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        named = named_memory_error(error) or named_write_error(error, getattr(error, "filename", "") or "a file", "use")
        if named is None:
            raise
        print(f"tad-plugin: {named}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Terminated) as stop:
        interrupted = isinstance(stop, KeyboardInterrupt)
        word = "interrupted" if interrupted else "terminated"
        print(f"tad-plugin: {word}; the same command resumes from the last checkpoint", file=sys.stderr)
        return 128 + (signal.SIGINT if interrupted else signal.SIGTERM)


def _run(given: list[str]) -> int:
    if given and given[0] in checkouts.VERBS:
        return checkouts.VERBS[given[0]](given[1:])
    from tad_plugin.experiments.parser import check_given, parsed, with_help, with_switches

    parser = _parser()
    given = with_switches(with_help(given))
    check_given(parser, given)
    values = parsed(parser, given)
    return VERBS[values.verb](values[values.verb]) or 0


if __name__ == "__main__":
    sys.exit(main())
