"""The `jlora` command."""

import ast
import contextlib
import dataclasses
import inspect
import io
import itertools
import logging
import os
import re
import sys
import traceback
import types
from collections.abc import Sequence
from typing import Annotated, Union

_PACKAGES = {
    "tyro": "tyro", "rich": "rich", "flax": "flax", "orbax": "orbax-checkpoint", "grain": "grain",
    "tokenizers": "tokenizers", "matplotlib": "matplotlib", "sacrebleu": "sacrebleu", "jinja2": "jinja2",
    "scipy": "scipy", "sklearn": "scikit-learn", "PIL": "pillow",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0 done, 1 the run had to stop, 2 wrong input, 130 and 143 stopped by Ctrl-C and SIGTERM.
    """
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except ModuleNotFoundError as error:
        package = _PACKAGES.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        print(f"jlora: the command line needs {package}: pip install 'jlora[train]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jlora: interrupted", file=sys.stderr)
        return 130


def command() -> int:
    """`main` for a process that does nothing else. One that trains starts over with huge pages, where it could."""
    if sys.argv[1:2] == ["finetune"] and not {"-h", "--help"} & set(sys.argv):
        from jlora.train.huge_pages import restart_with_huge_pages

        restart_with_huge_pages()
    return main()


def _main(argv: list[str]) -> int:
    import tyro

    from jlora.train import config as options  # without jax: `--help` answers at once

    commands = {
        "finetune": options.FinetuneConfig,
        "generate": options.GenerateConfig,
        "evaluate": options.EvaluateConfig,
        "merge": options.MergeConfig,
        "inspect": options.InspectConfig,
        "convert": options.ConvertConfig,
        "compare": options.CompareConfig,
        "methods": options.MethodsConfig,
        "models": options.ModelsConfig,
        "targets": options.TargetsConfig,
    }
    union = Union[tuple(Annotated[cls, tyro.conf.subcommand(name)] for name, cls in commands.items())]  # noqa: UP007
    description = "Low-rank adaptation of JAX models: fine-tune, look at, use and export adapters."
    _unwrap_docstrings(options)
    made = {"config": (tyro.conf.OmitArgPrefixes,)}
    if argv[:1] and argv[0] in commands and "--tyro-print-completion" not in argv:
        # By itself, so that its errors name its own options and point to its own help.
        config = tyro.cli(commands[argv[0]], args=argv[1:], prog=f"jlora {argv[0]}", **made)
    else:
        with _whole_descriptions(argv):
            config = tyro.cli(union, args=argv, prog="jlora", description=description, **made)
    try:
        return _run(config, argv)
    except (options.UserError, options.RunError) as error:
        if os.environ.get("JLORA_DEBUG"):
            traceback.print_exc()
        print(f"jlora: {error}", file=sys.stderr)
        return 2 if isinstance(error, options.UserError) else 1


def _run(config, argv: list[str]) -> int:
    from jlora.train import commands, finetune, inform
    from jlora.train import config as options

    run = {
        options.FinetuneConfig: lambda: finetune.finetune(config, argv),
        options.GenerateConfig: lambda: commands.generate(config),
        options.EvaluateConfig: lambda: commands.evaluate(config),
        options.MergeConfig: lambda: commands.merge(config),
        options.InspectConfig: lambda: commands.inspect(config),
        options.ConvertConfig: lambda: commands.convert(config),
        options.CompareConfig: lambda: inform.compare(config),
        options.MethodsConfig: lambda: inform.methods(config),
        options.ModelsConfig: lambda: inform.list_models(config),
        options.TargetsConfig: lambda: inform.targets(config),
    }[type(config)]
    with _quiet_orbax():
        return run()


def _unwrap_docstrings(module: types.ModuleType) -> None:
    """The docstring of each option as its help, on one line: tyro would keep its line breaks and wrap every line of it
    again."""
    for node in ast.parse(inspect.getsource(module)).body:
        if not isinstance(node, ast.ClassDef) or not dataclasses.is_dataclass(getattr(module, node.name)):
            continue
        fields = {field.name: field for field in dataclasses.fields(getattr(module, node.name))}
        for statement, after in itertools.pairwise(node.body):
            if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr):
                text = " ".join(ast.literal_eval(after.value).split())
                fields[statement.target.id].metadata = types.MappingProxyType({"help": text})


@contextlib.contextmanager
def _whole_descriptions(argv: list[str]):
    """What tyro prints for bash to complete with, each description on one line: bash would offer every line of one as a
    completion."""
    if "--tyro-print-completion" not in argv:
        yield
        return
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        table = re.compile("^COMPLETION_SPEC = .*", re.MULTILINE)
        sys.stdout.write(table.sub(lambda found: found[0].replace(r"\n", " "), printed.getvalue()))


@contextlib.contextmanager
def _quiet_orbax():
    """orbax logs each step it takes, and after a failed write or read what it left behind complains one by one: event
    loops, and reads of other arrays.

    The failure itself arrives as an exception, and is told in one line.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level

    def quiet_hook(unraisable):
        if not str(unraisable.exc_value).startswith(("Event loop is closed", "Encountered error while reading array")):
            hook(unraisable)

    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = quiet_hook
    try:
        yield
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook


if __name__ == "__main__":
    sys.exit(command())
