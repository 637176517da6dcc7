"""`detxai man`: the manual page, from the same table as the help."""

from collections.abc import Iterator
from typing import Any

from detxai.errors import PRECEDENCE, ExitCode

ABOUT = "why a detector reported what it reported"
MEANINGS = {
    ExitCode.OK: "every image has a valid record",
    ExitCode.BUG: "a bug of detxai",
    ExitCode.USAGE: "wrong usage or configuration",
    ExitCode.SOME_FAILED: "finished, some images failed",
    ExitCode.NO_INPUT: "no usable input",
    ExitCode.MODEL: "the model is missing, refused, or cannot be loaded",
    ExitCode.OUTPUT: "the output is not writable, full, or locked",
    ExitCode.DEVICE: "the device was lost, or memory ran out",
    ExitCode.OUT_OF_TIME: "stopped by --max-seconds",
    ExitCode.GATE: "a box has a verdict of --fail-on",
    ExitCode.INTERRUPTED: "interrupted",
    ExitCode.READER_GONE: "the reader of stdout went away",
    ExitCode.TERMINATED: "terminated",
}


def page(root: Any) -> str:
    """The manual page of the command `root` (of click), for man(1)."""
    import detxai

    lines = [f'.TH DETXAI 1 "" "detxai {detxai.__version__}"', ".SH NAME", f"detxai \\- {ABOUT}", ".SH SYNOPSIS"]
    commands = dict(_commands(root, "detxai"))
    lines += [f".B {name}\n[OPTIONS] {_arguments(command)}\n.br" for name, command in commands.items()]
    for name, command in commands.items():
        lines += [f".SH {name.upper()}", _plain(command.help or ""), *_options(command)]
    lines += [".SH EXIT STATUS", f"Where several hold, the first of {' '.join(map(str, PRECEDENCE))} wins."]
    lines += [f".TP\n.B {int(code)}\n{meaning}" for code, meaning in MEANINGS.items()]
    return "\n".join(lines) + "\n"


def _commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    below = getattr(command, "commands", None)
    if not below:
        yield name, command
    for word, inner in sorted((below or {}).items()):
        if not inner.hidden:
            yield from _commands(inner, f"{name} {word}")


def _arguments(command: Any) -> str:
    return " ".join(_argument(p) for p in command.params if p.param_type_name == "argument")


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return (name if parameter.required else f"[{name}]") + ("" if parameter.nargs == 1 else "...")


def _options(command: Any) -> Iterator[str]:
    for parameter in command.params:
        if parameter.param_type_name == "option":
            value = "" if parameter.is_flag or parameter.count else f" {parameter.metavar or parameter.name.upper()}"
            flags = ", ".join([*parameter.opts, *parameter.secondary_opts]).replace("-", "\\-")
            yield f".TP\n.B {flags}{value}\n{_plain(parameter.help or '')}"


def _plain(text: str) -> str:
    """`text` as roff: no line of it is a request, and no markup is left."""
    text = text.replace("\\[", "[").replace("\b\n", "").replace("\\", "\\e").replace("-", "\\-")
    return "\n".join(f"\\&{line.strip()}" for line in text.splitlines())
