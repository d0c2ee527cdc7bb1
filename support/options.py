"""Options: declared once as fields of dataclasses, each beside the code that reads it, and parsed from the
command line.

A field made by `option` carries its help text and bounds. A class of options may have a method `check()`,
which raises InputError where options do not go together. `--help` shows one group of options for each class.
"""

import argparse
import dataclasses

import torch

from support import processes
from support.files import InputError


def option(default, help, least=None, most=None, choices=None, nargs=None):
    """A field of an options dataclass. `least` and `most` are bounds, `choices` the values that are taken."""
    metadata = {"help": help, "least": least, "most": most, "choices": choices, "nargs": nargs}
    return dataclasses.field(default=default, metadata=metadata)


def flag(name):
    """The command line's spelling of an option: batch_tokens -> --batch-tokens."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line and exit status 2, without argparse's page of usage."""
        line = f"{self.prog}: {message} (--help lists the options)\n"
        self.exit(2, line if processes.is_first() else None)


def numbers(text):
    return [float(number) for number in text.split(",")]


def build_parser(cls, prog, description, epilog):
    """A parser of the options of a dataclass. What the user does not give is absent from what it returns."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog, description=description, epilog=epilog, formatter_class=form, allow_abbrev=False)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for owner in cls.__mro__:
        if dataclasses.is_dataclass(owner):
            group = parser.add_argument_group(owner.TITLE)
            for name in vars(owner)["__annotations__"]:
                add_argument(group, fields[name])
    return parser


def add_argument(group, field):
    settings = {"default": argparse.SUPPRESS}
    default = "" if field.default in ("", 0, (), False) else f" [{field.default}]"
    settings["help"] = (field.metadata["help"] + default).replace("%", "%%")
    for name in ("choices", "nargs"):
        if field.metadata[name] is not None:
            settings[name] = field.metadata[name]
    if field.type is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif field.type is not list:
        settings["type"] = field.type
    elif "nargs" not in settings:
        settings["type"] = numbers
    group.add_argument(flag(field.name), **settings)


def check(options):
    """Raises InputError, which names the option, where a value is out of bounds or options do not go
    together."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        least = field.metadata["least"]
        most = field.metadata["most"]
        too_small = least is not None and not value >= least  # also where the value is NaN
        too_large = most is not None and not value <= most
        if too_small or too_large:
            bounds = f"at least {least}" if most is None else f"{least} to {most}"
            raise InputError(f"{flag(field.name)}: {value} given, {bounds} expected")
    for owner in type(options).__mro__:
        if "check" in vars(owner):
            owner.check(options)


def check_device(device):
    try:
        if torch.device(device).type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("not a device to compute on")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device: {device} cannot be used ({reason})") from None


def split_pairs(pairs, name):
    """{NAME: PATH} of the NAME=PATH arguments of the option `name`."""
    paths = {}
    for pair in pairs:
        key, _, path = pair.partition("=")
        if not key or not path:
            raise InputError(f"{flag(name)}: {pair!r} given, NAME=PATH expected")
        paths[key] = path
    return paths
