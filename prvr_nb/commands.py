"""What the commands share: flags, messages, exit statuses."""
import _thread
import argparse
import errno
import math
import re
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from functools import wraps

from prvr_nb.config import RENAMED, Config
from prvr_nb.files import UserError


class Help(argparse.ArgumentDefaultsHelpFormatter):
    "Names a default only where there is one."
    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)

def flag(parser, name:str, default, text:str, **more):
    "Add a flag: a type instead of a default makes it required, False makes it a switch."
    if isinstance(default, type):
        parser.add_argument(name, type=default, required=True, help=text, **more)
    elif default is False:
        parser.add_argument(name, action="store_true", help=text, **more)
    else:
        kind = {} if default is None else {"type": type(default)}
        parser.add_argument(name, default=default, help=text, **{**kind, **more})

def alias(parser, name:str, dest:str, **more):
    "A flag's former name, which the help does not show."
    parser.add_argument(name, dest=dest, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **more)

def whole_numbers(text:str)->tuple:
    "Several whole numbers, separated by commas."
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers like 128,80,52,32") from None

def seconds(text:str)->float:
    "A stretch of time."
    with suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")

def config_flags(
    parser:argparse.ArgumentParser, # gets a flag per field of Config
    without:tuple=(), # fields that the command decides itself
):
    "Every setting as a flag; what is not given keeps the dataset's published value."
    parser.usage = "%(prog)s [--help] [--FLAG VALUE ...]"
    parser.epilog = ("A setting that is not given takes the dataset's published value (toy: ours). "
                     "Lists are whole numbers separated by commas.")
    former = {new: old for old, new in RENAMED.items()}
    for f in (f for f in fields(Config) if f.name not in without):
        kind, choices = type(f.default), f.metadata["choices"]
        taken = {"type": whole_numbers if kind is tuple else kind}
        shown = {"choices": choices, "metavar": None if choices else f.name.upper()}
        if kind is bool:
            taken, shown = {"action": argparse.BooleanOptionalAction}, {}
        name = "--" + f.name.replace("_", "-")
        parser.add_argument(name, default=argparse.SUPPRESS, help=f.metadata["help"], **taken, **shown)
        if f.name in former:
            alias(parser, "--" + former[f.name].replace("_", "-"), f.name, **taken)

def given_settings(args:argparse.Namespace)->dict: # field name → value
    "The settings that stand on the command line."
    return {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}

def say(text:str, file=None):
    "Print; a character that would steer the terminal (titles come from file names) becomes a question mark."
    print(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text), file=file or sys.stdout, flush=True)

def interrupt_again(unraisable):
    "Python drops a Ctrl-C that arrives in the callback of a weak reference, of which h5py has many; ask once more."
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Timer(0.01, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(unraisable)

def file_trouble(
    error:OSError, # of a file
    command:str, # its name
)->str: # what is wrong and what to do about it
    "Room for a file that did not fit; otherwise another look at the paths."
    remedy = "check --root, --out and --checkpoint"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        resumed = " with --resume: the last saved state is intact" * (command == "prvr_train")
        remedy = f"make room and run the command again{resumed}"
    return f"{error.filename or 'a file'} cannot be used ({error.strerror or error}); {remedy}"

def run_command(
    main:Callable, # does the work with parsed arguments; returns what is to be printed, or None
    parser:argparse.ArgumentParser, # reads the command line
    argv:list|None=None, # arguments, or None for those of the process
)->int: # exit status
    "Run a command; a user's mistake becomes one message on stderr and exit status 1, an interruption 130."
    args = parser.parse_args(argv)
    for stream in sys.stdout, sys.stderr:
        with suppress(AttributeError): # a terminal may lack the characters of a title, or of our strips
            stream.reconfigure(errors="backslashreplace")
    hook, sys.unraisablehook = sys.unraisablehook, interrupt_again
    try:
        printed = main(args)
        if printed is not None:
            say(printed)
        return 0
    except UserError as error:
        status, complaint = 1, str(error)
    except OSError as error:
        status, complaint = 1, file_trouble(error, parser.prog)
    except KeyboardInterrupt:
        status, complaint = 130, "stopped"
    finally:
        sys.unraisablehook = hook
    say(f"{parser.prog}: {complaint}", sys.stderr)
    return status

def command(
    build:Callable, # adds flags to a parser and returns the function that works with the parsed arguments
)->Callable: # arguments of the process → exit status
    "A console script: prvr_NAME for NAME_command, described by its docstring."
    @wraps(build)
    def script(argv:list|None=None)->int:
        name = "prvr_" + build.__name__.partition("_")[0]
        parser = argparse.ArgumentParser(name, allow_abbrev=False, description=build.__doc__, formatter_class=Help)
        return run_command(build(parser), parser, argv)
    return script

def actions_of(parser:argparse.ArgumentParser, **helps:str)->list: # of parsers
    "A parser for each action of a command."
    actions = parser.add_subparsers(dest="action", required=True)
    return [actions.add_parser(name, help=text, allow_abbrev=False, formatter_class=Help)
            for name, text in helps.items()]
