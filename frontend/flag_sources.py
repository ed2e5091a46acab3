"""Where flags come from besides the command line: a YAML file and ENGINE_* variables, both turned into arguments.

Called by flags.py only. What is here has the weight of a default: the command line wins over the environment, the
environment over the file. Must never guess: an entry no flag has is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from frontend.digests import ENVIRONMENT
from frontend.flag_groups import FlagParser
from ipc.errors import ConfigError

CONFIG_FLAG: Final = "--config"
_PREFIX: Final = "ENGINE_"
_TRUE: Final = ("1", "true", "yes", "on")
_FALSE: Final = ("0", "false", "no", "off", "")
_NO_SETTINGS: Final = ("--help", "--version", CONFIG_FLAG)  # ENGINE_VERSION is likely to be somebody else's
_TYPO: Final = 0.85  # so much alike, and a variable was meant for us


def config_file(argv: Sequence[str], environ: Mapping[str, str]) -> Path | None:
    """The file that --config or ENGINE_CONFIG names; the last one counts."""
    found = environ.get(_PREFIX + "CONFIG") or None
    for i, argument in enumerate(argv):
        if argument.startswith(f"{CONFIG_FLAG}="):
            found = argument.partition("=")[2]
        elif argument == CONFIG_FLAG:
            found = argv[i + 1] if i + 1 < len(argv) else found
    return Path(found) if found else None


def from_file(parser: FlagParser, path: Path) -> list[str]:
    """The entries of a YAML file as arguments: `max-num-seqs: 4`, with dashes or underscores. Raises ConfigError."""
    try:
        entries = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not readable YAML: {reason}", param=CONFIG_FLAG) from error
    if entries is None:
        return []
    if not isinstance(entries, dict):
        raise ConfigError(f"{path} holds a {type(entries).__name__}, expected flags by name", param=CONFIG_FLAG)
    arguments: list[str] = []
    for name, value in entries.items():
        flag = f"--{str(name).replace('_', '-')}"
        if flag in _NO_SETTINGS:
            raise ConfigError(f"{path}: {name} is no setting", param=CONFIG_FLAG)
        if isinstance(value, (dict, list)):
            raise ConfigError(f"{path}: {name} holds a {type(value).__name__}, expected one value", param=CONFIG_FLAG)
        arguments += _argument(parser, flag, value)
    return arguments


def from_environ(parser: FlagParser, environ: Mapping[str, str]) -> list[str]:
    """ENGINE_MAX_NUM_SEQS=4 as --max-num-seqs=4, for every flag and alias of `parser`.

    Other programs may have variables of that prefix; only one that is nearly a flag is a ConfigError. The API key is
    left to digests.py, which takes it out of the environment; an empty one is a ConfigError.
    """
    arguments: list[str] = []
    for variable, text in environ.items():
        if variable == ENVIRONMENT:
            if not text.strip():
                raise ConfigError(f"{variable}: is empty")  # rather than an open service
            continue
        flag = "--" + variable.removeprefix(_PREFIX).lower().replace("_", "-")
        if not variable.startswith(_PREFIX) or flag in _NO_SETTINGS:
            continue
        action = parser.find(flag)
        if action is None:
            if (meant := parser.closest(flag, cutoff=_TYPO)) is not None:
                name = _PREFIX + meant[2:].replace("-", "_").upper()
                raise ConfigError(f"{variable}: no such variable; did you mean {name}?")
            continue
        is_switch = action.nargs == 0
        if is_switch and text.lower() not in _TRUE + _FALSE:
            raise ConfigError(f"{variable}: expected true or false, got {text!r}")
        arguments += _argument(parser, flag, text.lower() in _TRUE if is_switch else text)
    return arguments


def _argument(parser: FlagParser, flag: str, value: Any) -> list[str]:
    if value is None:
        return []
    if value is True:
        return [flag]
    if value is False:
        return [parser.negated(flag)]
    return [f"{flag}={value}"]
