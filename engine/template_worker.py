"""The child process in which a checkpoint's chat template runs; started by engine/chat.py.

Jinja's sandbox keeps a template from reading files, not from running for ever or filling the memory
({% for %} in {% for %}, 'x' * 10**9, a hundred doublings). Which filters and operators can do so is an
open list, so the bound is the process: the memory limit is set here, the time limit is the parent's
kill. Talks in lines of JSON on stdin and stdout. Imports nothing of the project, and is run with -P:
beside it lies a types.py that would hide the standard library's.
"""

import json
import sys
from datetime import datetime

from jinja2 import TemplateError, ext, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 512 * 2**20
MAX_CHARS = 8 * 2**20


class Generation(ext.Extension):
    """{% generation %} marks answers for training masks; rendering keeps its body as it is."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own way to declare it

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.Scope(body, lineno=line)


def make_environment():
    """The same environment as transformers' apply_chat_template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def raise_exception(message):
    raise TemplateError(message)


def strftime_now(form):
    return datetime.now().strftime(form)


def render(template, values):
    pieces, length = [], 0
    for piece in template.generate(values):
        length += len(piece)
        if length > MAX_CHARS:
            raise TemplateError(f"the prompt has over {MAX_CHARS:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def answer(work):
    """Run work() -> one line of JSON, whatever the template does."""
    try:
        reply = {"text": work()}
    except MemoryError:
        reply = {"error": "it needs too much memory"}
    except RecursionError:
        reply = {"error": "it calls itself without end"}
    except Exception as error:  # noqa: BLE001 - a template may raise anything; the user reads it
        reply = {"error": f"{error}" or type(error).__name__}
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()


def limit_memory():
    try:
        import resource
    except ImportError:  # not on Windows; the time limit stands alone there
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def main():
    limit_memory()
    template = None

    def compile_template():
        nonlocal template
        template = make_environment().from_string(json.loads(sys.stdin.readline()))
        return ""

    answer(compile_template)
    for line in sys.stdin:
        answer(lambda line=line: render(template, json.loads(line)))


if __name__ == "__main__":
    main()
