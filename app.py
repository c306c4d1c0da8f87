"""The command line: `python app.py` opens the studio in a browser, with the OpenAI API beside it.

This is the only place that reads arguments and environment variables, and the only one that ends the
process. Heavy imports wait until the arguments are known to be good.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine import ConfigError, EngineConfig, EngineError

DEMO_MODEL = Path(__file__).parent / "assets" / "demo_model"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
USAGE_ERROR, RUN_ERROR = 2, 1


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, and takes --flag_name for --flag-name."""

    def error(self, message: str) -> None:
        self.exit(USAGE_ERROR, f"{message[:1].upper()}{message[1:]}. See: python app.py --help\n")

    def parse_args(self, args: Sequence[str], namespace: None = None) -> argparse.Namespace:
        return super().parse_args([_with_hyphens(arg) for arg in args], namespace)


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: a folder on this machine, or a name on Hugging Face."""

    folder: Path | None
    hub_id: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(sys.argv[1:] if argv is None else argv)
    try:
        source = find_model(arguments.model)
        config = engine_config(arguments, source)
        set_environment(online=source.hub_id is not None)
        logging.basicConfig(level=arguments.log_level.upper(), format="%(levelname)s %(message)s")
        return serve_web(arguments, source, config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return USAGE_ERROR
    except EngineError as error:
        print(error, file=sys.stderr)
        return RUN_ERROR
    except KeyboardInterrupt:
        return 0


def build_parser() -> Parser:
    parser = Parser(prog="app.py", description="LMDeck: chat with a model on this machine.")
    parser.add_argument("--model", help="a model folder or Hugging Face name; default: the demo")
    parser.add_argument("--server-name", default="127.0.0.1", help="default: this machine only")
    parser.add_argument(
        "--server-port", type=_port, default=7860, help="default: 7860; 0 picks a free one"
    )
    parser.add_argument("--share", action="store_true", help="open a public link, for anyone")
    parser.add_argument("--api-keys", nargs="+", default=[], help="keys that the API asks for")
    parser.add_argument(
        "--log-level",
        default="warning",
        choices=("debug", "info", "warning", "error"),
        help="what is printed while it runs; default: warning",
    )
    add_engine_arguments(parser)
    return parser


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of a loaded model; those not given keep EngineConfig's defaults."""
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), help="default: auto")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "float16", "bfloat16"), help="default: auto"
    )
    parser.add_argument("--session-len", type=int, help="longest prompt plus answer, in tokens")
    parser.add_argument(
        "--max-batch-size", type=int, help="most requests answered at once; default: 64"
    )
    parser.add_argument(
        "--cache-max-entry-count",
        type=float,
        help="share of free memory for the KV cache; default: 0.8 on a GPU, at most 2 GiB on a CPU",
    )
    parser.add_argument(
        "--quant-policy", type=int, choices=(0, 4, 8), help="bits of the KV cache; 0: unquantized"
    )
    parser.add_argument("--model-format", choices=("auto", "hf", "awq"), help="default: auto")


def find_model(name: str | None) -> ModelSource:
    """A folder wins over a Hugging Face name; with neither, the sentence says what was looked for."""
    if name is None:
        return ModelSource(DEMO_MODEL)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return ModelSource(folder)
    if HUB_ID.fullmatch(name):
        return ModelSource(None, name)
    raise ConfigError(
        f"There is no model folder at {name}, and it is not a Hugging Face name such as "
        "Qwen/Qwen2.5-0.5B-Instruct. Give one of the two with --model."
    )


def engine_config(arguments: argparse.Namespace, source: ModelSource) -> EngineConfig:
    names = ("device", "dtype", "session_len", "max_batch_size", "cache_max_entry_count")
    names += ("quant_policy", "model_format")
    given = {n: getattr(arguments, n) for n in names if getattr(arguments, n) is not None}
    if source.hub_id is not None:
        given["model_name"] = source.hub_id
    return EngineConfig(source.folder or Path(source.hub_id), **given)


def set_environment(*, online: bool) -> None:
    """Before Gradio and Hugging Face are imported: no telemetry, and no network unless asked for."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if not online:
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["TRANSFORMERS_OFFLINE"] = "1"


def serve_web(arguments: argparse.Namespace, source: ModelSource, config: EngineConfig) -> int:
    listener = bind(arguments.server_name, arguments.server_port)  # before anything slow
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from engine import ModelHost
    from engine.api import create_router
    from ui.server import StudioServer

    host = ModelHost()
    server = StudioServer(
        host,
        routers=[create_router(host, api_keys=tuple(arguments.api_keys))],
        listener=listener,
        server_name=arguments.server_name,
        share=arguments.share,
    )
    return server.run(source.hub_id, config)


def bind(name: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((name, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        advice = "This machine does not have that address; use 127.0.0.1, or 0.0.0.0 for all."
        if error.errno == errno.EADDRINUSE:
            advice = (
                "Another LMDeck may be running there; choose another port, for example "
                f"--server-port {port % 65535 + 1}."
            )
        reason = error.strerror or error
        raise ConfigError(f"Cannot listen on {name}:{port}: {reason}. {advice}") from error
    return listener


def _port(written: str) -> int:
    if not written.isdecimal() or int(written) > 65535:
        raise argparse.ArgumentTypeError(f"{written} is not a port; expected 0 to 65535")
    return int(written)


def _with_hyphens(argument: str) -> str:
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else argument


if __name__ == "__main__":
    sys.exit(main())
