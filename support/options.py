"""Options: declared once as fields of dataclasses, each beside the code that reads it, and parsed from the
command line.

A field made by `option` carries its help text and bounds. A class of options has a TITLE, under which
`--help` shows them, and READ_BY, the stages that read them (all: ()). It may have a method `check()`, which
raises InputError where options do not go together. """

import argparse
import dataclasses
import inspect

import torch

from support import processes
from support.files import InputError


LARGEST = 2**62  # of all numbers


def option(default, help, **metadata):
    """A field of an options dataclass. metadata may have `least` and `most`, the bounds; `choices`, the
    values that are taken; `nargs`; `read_by`, the stages that read it where they are others than the class's;
    `needs`, (name, value) of another option without which this one has no effect, or its name alone."""
    return dataclasses.field(default=default, metadata={"help": help} | metadata)


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
            for name in inspect.get_annotations(owner):
                add_argument(group, fields[name])
    return parser


def add_argument(group, field):
    settings = {"default": argparse.SUPPRESS}
    default = "" if field.default in ("", 0, (), False) else f" [{field.default}]"
    settings["help"] = (field.metadata["help"] + default).replace("%", "%%")
    for name in ("choices", "nargs"):
        if name in field.metadata:
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
        if value is None:
            continue
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, (int, float)) and not abs(number) <= LARGEST:  # also where it is NaN
                expected = f"a finite number up to {LARGEST:g} expected"
                raise InputError(f"{flag(field.name)}: {number} given, {expected}")
        least = field.metadata.get("least")
        most = field.metadata.get("most")
        too_small = least is not None and value < least
        too_large = most is not None and value > most
        if too_small or too_large:
            bounds = f"at least {least}" if most is None else f"{least} to {most}"
            raise InputError(f"{flag(field.name)}: {value} given, {bounds} expected")
    for owner in type(options).__mro__:
        if "check" in vars(owner):
            owner.check(options)


def readers(cls, name):
    """The stages that read an option of a class of options; () for all of them."""
    for owner in cls.__mro__:
        if name in inspect.get_annotations(owner):
            return cls.__dataclass_fields__[name].metadata.get("read_by", owner.READ_BY)


def idle_options(arguments, by_stage):
    """Lines that name the options of the user's that change nothing. arguments: {name: value}; by_stage:
    {stage: its options} of the stages that are to run."""
    cls = type(next(iter(by_stage.values())))
    unread = []
    lines = []
    for name, field in cls.__dataclass_fields__.items():
        if name not in arguments:
            continue
        stages = readers(cls, name)
        reading = [options for stage, options in by_stage.items() if not stages or stage in stages]
        need = field.metadata.get("needs")
        if not reading:
            unread.append(f"{flag(name)} ({', '.join(stages)})")
        elif need and not any(meets(options, need) for options in reading):
            condition = flag(need) if isinstance(need, str) else f"{flag(need[0])} {need[1]}"
            lines.append(f"{flag(name)} has no effect without {condition}")
    if unread:
        lines.append(f"no effect in {', '.join(by_stage)}, but in other stages: {', '.join(unread)}")
    return lines


def meets(options, need):
    if isinstance(need, str):
        return bool(getattr(options, need))
    name, value = need
    return getattr(options, name) == value


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
        if not key or not path or "/" in key or key in paths:  # a name may become that of a file
            raise InputError(f"{flag(name)}: {pair!r} given, NAME=PATH expected, each name once")
        paths[key] = path
    return paths
