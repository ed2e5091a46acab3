"""The flags themselves, group by group as --help shows them, and the values they take.

Used by flags.py, which knows where flags come from and what becomes of them, and by `engine-frontend`.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn

from frontend.digests import digest
from frontend.tools import PARSERS
from ipc.config import MAX_DEPTH
from ipc.errors import ConfigError

_SWITCH: Final = argparse.BooleanOptionalAction  # every switch has a --no- form, for files and variables
_INT32_MAX: Final = 2**31 - 1
_UNITS: Final = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def _integer(low: int, high: int = _INT32_MAX) -> Any:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if not low <= value <= high:
            bounds = f"at least {low}" if value < low and high >= _INT32_MAX else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {value}")
        return value

    return parse


def _number(low: float, high: float = math.inf, *, above: bool = False) -> Any:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        if not low <= value <= high or (above and value == low) or math.isinf(value):
            bounds = f"{'above' if above else 'at least'} {low:g}" + ("" if math.isinf(high) else f", at most {high:g}")
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {value:g}")
        return value

    return parse


def _size_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"expected bytes such as 4000000000, 4G or 512MiB, got {text!r}")
    value = int(float(match[1]) * _UNITS[match[2] or ""])
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text!r}")
    return value


def _metrics_prefix(text: str) -> str:
    if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", text):
        raise argparse.ArgumentTypeError(f"expected letters, digits and underscores, got {text!r}")
    return text


class _Help(argparse.HelpFormatter):
    """Says every default, and breaks no flag at its dashes."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default, text = action.default, action.help or ""
        if default in (None, False, argparse.SUPPRESS, []) or "default" in text:
            return text
        return f"{text} (default: {'on' if default is True else '%(default)s'})".lstrip()

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.fill(
            " ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )


class FlagParser(argparse.ArgumentParser):
    """argparse that raises ConfigError: a fault of the user is one line, not a usage page."""

    def __init__(self, *, aliases: Mapping[str, str] | None = None, **options: Any) -> None:
        """`aliases`: names that the caller replaces by those of flags before they come here."""
        super().__init__(formatter_class=_Help, allow_abbrev=False, **options)
        self._aliases = aliases or {}

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but what nobody knows is answered with what may have been meant."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            meant = self.closest(name)
            hint = f"; did you mean {meant}?" if meant else "; see --help"
            raise ConfigError(f"{name}: no such flag{hint}" if name[0] == "-" else f"unexpected argument {name!r}")
        return found

    def find(self, flag: str) -> argparse.Action | None:
        return self._option_string_actions.get(self._aliases.get(flag, flag))

    def negated(self, flag: str) -> str:
        """The switch that means the opposite of `flag`, which may be an alias and a --no- form itself."""
        flag = self._aliases.get(flag, flag)
        return f"--{flag[5:]}" if flag.startswith("--no-") else f"--no-{flag[2:]}"

    def closest(self, name: str, cutoff: float = 0.7) -> str | None:
        """The flag that somebody who wrote `name` is likely to have meant."""
        known = [*self._option_string_actions, *self._aliases]
        # Without their dashes, which alone would make short names alike.
        close = difflib.get_close_matches(name.lstrip("-"), [flag.lstrip("-") for flag in known], n=1, cutoff=cutoff)
        return f"--{close[0]}" if close else None


def _model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("model_positional", nargs="?", metavar="MODEL", help="same as --model")
    group.add_argument("--model", metavar="MODEL", help="folder with config.json and safetensors, or hub id ORG/NAME")
    group.add_argument(
        "--served-model-name", metavar="NAME", help="name in the API (default: the folder's name, or the hub id)"
    )
    group.add_argument(
        "--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"), help="auto: as the model says"
    )
    group.add_argument("--max-model-len", type=_integer(1), metavar="TOKENS", help="context; default: the model's own")
    group.add_argument("--max-logprobs", type=_integer(0, 1000), default=20, metavar="N", help="most a request may ask")
    group.add_argument(
        "--generation-config",
        default="auto",
        metavar="SOURCE",
        help="sampling defaults: auto (the model's), vllm (the API's), or a folder",
    )
    group.add_argument(
        "--seed", type=_integer(0, 2**63 - 1), default=0, help="of random weights; requests bring their own"
    )
    group.add_argument(
        "--trust-remote-code", action=_SWITCH, default=False, help="run Python code found in the model folder"
    )
    group.add_argument(
        "--random-weights", action=_SWITCH, default=False, help="no safetensors needed: for benchmarks of shapes"
    )


def _server_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    group.add_argument("--port", type=_integer(0, 65535), default=8000, help="0: a free one (default: %(default)s)")
    group.add_argument("--uds", metavar="PATH", help="listen on a unix socket instead of host and port")
    group.add_argument("--frontends", type=_integer(0, 64), default=1, metavar="N", help="HTTP processes (default: 1)")
    group.add_argument("--max-num-queued-reqs", type=_integer(1), default=100_000, metavar="N", help="beyond: HTTP 429")
    group.add_argument("--max-num-queued-tokens", type=_integer(1), metavar="N", help="of waiting prompts; beyond: 429")
    group.add_argument(
        "--frontend-endpoint", metavar="tcp://HOST:PORT", help="for frontends of other hosts; needs --auth-keys"
    )
    group.add_argument("--auth-keys", metavar="DIR", help="key folder of the engine, by scripts/make_keys.py")


def _cluster_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cluster")
    group.add_argument("--cluster", choices=("ray",), help="place replicas and frontends on the nodes of a cluster")
    group.add_argument("--ray-address", default="auto", metavar="ADDRESS", help="of a Ray cluster (default: auto)")
    group.add_argument(
        "--max-replicas", type=_integer(1, 1024), metavar="M", help="with --cluster: more of them while requests wait"
    )
    group.add_argument(
        "--max-frontends", type=_integer(1, 1024), metavar="N", help="with --cluster: more of them while many are open"
    )


def _scheduling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scheduling")
    group.add_argument("--max-num-seqs", type=_integer(1, 8192), default=256, metavar="N", help="requests in a step")
    group.add_argument(
        "--max-num-batched-tokens",
        type=_integer(1),
        metavar="N",
        help="tokens in a step (default: 8192 on CUDA, 2048 on a CPU)",
    )
    group.add_argument(
        "--long-prefill-token-threshold",
        type=_integer(1),
        metavar="N",
        help="prompt tokens of one request in a step (default: all)",
    )
    group.add_argument(
        "--pipeline-depth",
        type=_integer(0, MAX_DEPTH),
        metavar="D",
        help="steps in flight: 1 synchronous; 0, the default: 2, and 3 while steps take less than 1.5 ms",
    )
    group.add_argument("--async-scheduling", action=_SWITCH, default=None, help="same as depth 0 / depth 1")
    group.add_argument("--enable-prefix-caching", action=_SWITCH, default=True, help="default on")


def _device_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("device and memory")
    group.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: CUDA if the driver shows a GPU"
    )
    group.add_argument(
        "--tensor-parallel-size", type=_integer(1, 32), default=1, metavar="N", help="GPUs that share the model"
    )
    group.add_argument(
        "--nnodes", type=_integer(1, 32), metavar="N", help="nodes that hold these ranks; the same command on each"
    )
    group.add_argument("--node-rank", type=_integer(0, 31), default=0, metavar="K", help="which of them this is")
    group.add_argument("--master-addr", metavar="HOST", help="by which the other nodes reach node 0; needs --auth-keys")
    group.add_argument(
        "--master-port", type=_integer(0, 65535), default=29501, metavar="PORT", help="likewise (default: %(default)s)"
    )
    group.add_argument("--disable-custom-all-reduce", action=_SWITCH, default=False, help="sums over GPUs by NCCL only")
    group.add_argument(
        "--data-parallel-size",
        type=_integer(0, 1024),
        default=1,
        metavar="M",
        help="replicas of the model that share the requests; 0: only those that join",
    )
    group.add_argument(
        "--join", metavar="ENDPOINT", help="of a running engine that the replicas of this one shall be a part of"
    )
    group.add_argument("--block-size", type=_integer(1, 256), default=16, metavar="TOKENS", help="tokens of a KV block")
    group.add_argument("--num-gpu-blocks-override", type=_integer(2), metavar="N", help="KV blocks; default: profile")
    group.add_argument("--kv-cache-memory-bytes", type=_size_bytes, metavar="SIZE", help="such as 4G, or 512MiB")
    group.add_argument(
        "--gpu-memory-utilization",
        type=_number(0, 1, above=True),
        default=0.9,
        metavar="SHARE",
        help="of its memory, for all of the engine",
    )
    group.add_argument("--enforce-eager", action=_SWITCH, default=False, help="no CUDA graphs, and --no-compile")
    group.add_argument(
        "--compile",
        action=_SWITCH,
        help="fused decoder with tuned products and sums by peer memory, or else compiled layers (default: on CUDA)",
    )


def _api_key(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return digest(text)


def http_flags(parser: argparse.ArgumentParser) -> None:
    """What every serving frontend has a say in: also flags of `engine-frontend`."""
    group = parser.add_argument_group("serving")
    group.add_argument(
        "--watchdog-timeout", type=_number(0, above=True), default=60.0, metavar="S", help="a step longer is a hang"
    )
    group.add_argument(
        "--shutdown-timeout", type=_number(0), default=30.0, metavar="S", help="for open requests at SIGTERM"
    )
    group.add_argument(
        "--request-timeout", type=_number(0, above=True), metavar="S", help="a request that takes longer fails"
    )
    group.add_argument(
        "--queue-timeout", type=_number(0, above=True), metavar="S", help="a request that waits longer to run fails"
    )
    group.add_argument(
        "--api-key",
        action="append",
        type=_api_key,
        default=[],
        metavar="KEY",
        help="needed to use the API; may be repeated. A file, or ENGINE_API_KEY in the environment, is safer",
    )
    group.add_argument("--api-key-file", metavar="FILE", help="a key a line")
    group.add_argument("--isolate-api-keys", action=_SWITCH, default=False, help="keys share no cached prefixes")
    group.add_argument(
        "--allowed-origins",
        metavar="ORIGINS",
        help="whose web pages may call the API: https://a.example, several with commas, or * (default: none)",
    )
    group.add_argument(
        "--metrics-prefix", type=_metrics_prefix, default="engine", metavar="NAME", help="vllm: for its dashboards"
    )
    group.add_argument("--chat-template", metavar="FILE", help="jinja file, instead of the model's own template")
    group.add_argument(
        "--tool-call-parser", choices=PARSERS, help="how the model writes tool calls (default: by its chat template)"
    )
    group.add_argument(
        "--enable-auto-tool-choice",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="for vLLM's command lines: it is always on",
    )


def _configuration_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("configuration")
    group.add_argument(
        "--config", metavar="FILE", help="YAML, such as `port: 9000`; ENGINE_PORT=9000 in the environment wins over it"
    )
    group.add_argument(
        "--print-config", action=_SWITCH, default=False, help="print every option as such a file, and exit"
    )
    group.add_argument(
        "--disable-log-stats", action=_SWITCH, default=False, help="no line of statistics every ten seconds"
    )


def log_flags(parser: argparse.ArgumentParser) -> None:
    """Also flags of `engine-frontend`."""
    group = parser.add_argument_group("logs")
    group.add_argument(
        "--log-level",
        default="info",
        choices=("debug", "info", "warning", "error"),
        help="debug also names ignored fields of requests",
    )
    group.add_argument(
        "--log-format", default="text", choices=("text", "json"), help="json: an object a line, of every process"
    )


def _supervision_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("supervision")
    group.add_argument("--max-restarts", type=_integer(0), default=3, metavar="N", help="of a process in ten minutes")
    group.add_argument(
        "--fake-executor", action=_SWITCH, default=False, help="made-up tokens: measures everything but the model"
    )
    group.add_argument(
        "--enable-debug-endpoints", action=_SWITCH, default=False, help="GET /debug/invariants, POST /debug/trace"
    )


def _debug_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("looking inside")
    group.add_argument("--trace", metavar="FILE", help="write a Perfetto trace of every step when the engine stops")


GROUPS: Final[tuple[Callable[[argparse.ArgumentParser], None], ...]] = (
    _model_flags,
    _server_flags,
    _cluster_flags,
    _scheduling_flags,
    _device_flags,
    http_flags,
    _supervision_flags,
    _configuration_flags,
    log_flags,
    _debug_flags,
)
