"""The program `lightning-influence`. What a command needs is imported once it is asked for: `--help` is quick."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_influence.audit.report import AuditReport

FAILED, WRONG, TOO_NOISY, CANNOT_TELL = 1, 2, 3, 4

_CODES = f"""
exit codes:
  0  done
  {FAILED}  it failed, with a sentence on stderr
  {WRONG}  wrong usage
  {TOO_NOISY}  more labels are estimated to be wrong than --fail-over allows
  {CANNOT_TELL}  the audit can't tell how many are, and --fail-over asks
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Of the command line, by default those of this process.

    Returns:
        The exit code.
    """
    parser = _parser()
    asked, rest = parser.parse_known_args(arguments)
    if rest and asked.command != "audit":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(asked.run(asked, rest))
    # Whatever a user's configuration, files and model raise: said in one line, unless it is asked for in full.
    except Exception as error:
        if asked.traceback:
            raise
        print(f"lightning-influence {asked.command}: {_told(error)}", file=sys.stderr)
        return WRONG if type(error).__name__ == "UsageError" else FAILED


def _told(error: Exception) -> str:
    name = type(error).__name__
    plain = isinstance(error, (ValueError, RuntimeError, FileNotFoundError, ImportError)) or "Misconfig" in name
    return f"{error}" if plain and str(error) else f"{name}: {error} (--traceback shows where)"


def _parser() -> argparse.ArgumentParser:
    about = "Find the training examples a model learned from, and the wrong labels among them."
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("lightning-influence", description=about, epilog=_CODES, formatter_class=plain)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, told: str, epilog: str = "") -> argparse.ArgumentParser:
        one = commands.add_parser(
            name, help=told, description=f"{told[0].upper()}{told[1:]}.", epilog=epilog + _CODES, formatter_class=plain
        )
        one.add_argument("--traceback", action="store_true", help="show where an error comes from")
        return one

    audit = command(
        "audit",
        "audit a model that was trained before, from the YAML of its LightningCLI and a checkpoint",
        "Anything else of the YAML can be overridden: --data.batch_size 64, --trainer.accelerator cpu.\n"
        "Loggers and other callbacks of the trainer are left out, and one device is used.\n",
    )
    audit.add_argument("--config", required=True, metavar="YAML", help="what the training was configured by")
    audit.add_argument(
        "--ckpt_path", metavar="PATH", help="the checkpoint to audit, or a directory that holds one (of a run)"
    )
    audit.add_argument(
        "--ckpt_paths", nargs="+", default=[], metavar="PATH", help="checkpoints of the run, for tracin and labels"
    )
    audit.add_argument("--model", metavar="CLASS", help="package.module.Class of the model, if the YAML names none")
    audit.add_argument("--data", metavar="CLASS", help="the same of the data module")
    audit.add_argument("--cli", metavar="CLASS", help="a LightningCLI of your own, for its arguments and links")
    audit.add_argument(
        "--dirpath", metavar="DIR", help="where the audit goes; by default `influence` beside the checkpoints' folder"
    )
    for name, told in (
        ("curvature", "identity, diagonal, kfac, ekfac, block_ggn, ggn or hessian"),
        ("damping", 'a number, or "relative", "trainer", "auto"'),
        ("layers", "what to audit: names or patterns, with commas"),
        ("uncovered", "report or exact"),
        ("queries", '"worst" for the validation examples with the highest loss'),
    ):
        audit.add_argument(f"--{name}", help=f"{told}; else as the InfluenceAudit of the YAML, if it has one")
    _add_limit(audit)
    audit.set_defaults(run=_audit)

    view = command("view", "look at audits in a browser, and decide about labels")
    view.add_argument("directory", metavar="DIR", help="of an audit, or of runs that hold some")
    view.add_argument("--port", type=int, help="0 for any that is free")
    view.add_argument(
        "--host", default="127.0.0.1", help="where to listen; by default this machine alone can reach the page"
    )
    view.add_argument("--open", action="store_true", help="open the browser")
    view.set_defaults(run=_view)

    report = command("report", "print an audit, and write it to other files")
    report.add_argument("directory", metavar="DIR", help="of an audit, or of a run that holds one")
    report.add_argument("--html", metavar="FILE", help="write the page of `view` as one file that needs no server")
    report.add_argument("--csv", metavar="FILE", help="write all examples, the most suspicious first")
    _add_limit(report)
    report.set_defaults(run=_report)

    compare = command("compare", "compare two audits: scores, candidates and estimated noise")
    compare.add_argument("first", metavar="DIR", help="of an audit, or of a run that holds one")
    compare.add_argument("second", metavar="DIR", help="of another audit")
    compare.set_defaults(run=_compare)
    return parser


def _add_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fail-over",
        type=_share,
        metavar="SHARE",
        help=f"exit with {TOO_NOISY} if a larger share of the labels is estimated to be wrong, such as 0.05, and with "
        f"{CANNOT_TELL} if the audit can't tell",
    )


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; expected a number from 0 to 1, such as 0.05")
    return value


def _audit(asked: argparse.Namespace, rest: Sequence[str]) -> int:
    from lightning_influence.cli.configured import Configured

    if asked.ckpt_path is None and not asked.ckpt_paths:
        raise ValueError("there is no checkpoint to audit; pass --ckpt_path, a file or the directory of a run.")
    names = ("curvature", "damping", "layers", "uncovered", "queries", "dirpath")
    given = {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}
    found = Configured.read(asked.config, rest, given, model=asked.model, data=asked.data, cli=asked.cli)
    report = found.audit.audit(
        found.model, found.data, ckpt_path=asked.ckpt_path, ckpt_paths=asked.ckpt_paths, trainer=found.trainer
    )
    return 0 if report is None else _code(report, asked.fail_over)  # rank zero tells


def _view(asked: argparse.Namespace, rest: Sequence[str]) -> int:
    from lightning_influence.view import serve

    serve(asked.directory, asked.port, host=asked.host, open_browser=asked.open)
    return 0


def _report(asked: argparse.Namespace, rest: Sequence[str]) -> int:
    from lightning_influence.audit.report import AuditReport

    report = AuditReport.load(asked.directory)
    print(report)
    if asked.html:
        from lightning_influence.view import export_html

        export_html(report.directory or asked.directory, asked.html)
    if asked.csv:
        report.write_review(asked.csv, most=len(report))
    return _code(report, asked.fail_over)


def _compare(asked: argparse.Namespace, rest: Sequence[str]) -> int:
    from lightning_influence.audit.comparison import Comparison
    from lightning_influence.audit.report import AuditReport

    print(Comparison.of(AuditReport.load(asked.first), AuditReport.load(asked.second)))
    return 0


def _code(report: AuditReport, limit: float | None) -> int:
    if limit is None:
        return 0
    found = report.health()
    if found.verdict != "told":
        print(f"--fail-over {limit:g}: it can't be told how many labels are wrong: {found.reason}", file=sys.stderr)
        return CANNOT_TELL
    over = found.noise_rate > limit
    told = f"{'more' if over else 'no more'} labels are estimated to be wrong: {found.noise_rate:.1%}"
    print(f"--fail-over {limit:g}: {told}", file=sys.stderr)
    return TOO_NOISY if over else 0
