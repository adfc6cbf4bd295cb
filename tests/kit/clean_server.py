"""A process that has torch and transformers loaded and nothing of ours, and answers each request with a fork of itself.

Called as `python -I clean_server.py SOCKET`; ends when its standard input does. A request is one line of JSON: `arguments` of a script,
`environment`, `work` (its folder); the answer one of `returncode`, `stdout` and `stderr`.
"""

import json
import os
import runpy
import select
import socket
import sys
import traceback
from pathlib import Path

import transformers
import transformers.dynamic_module_utils as modules
from transformers import AutoTokenizer, LlamaForCausalLM

LOADED = (transformers, AutoTokenizer, LlamaForCausalLM)


def main(place: str) -> None:
    if "sparsmith" in sys.modules:
        raise SystemExit("this process is not clean")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(place)
    listening.listen()
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([listening, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        caller, _ = listening.accept()
        with caller, caller.makefile("rw") as lines:
            lines.write(json.dumps(answered(json.loads(lines.readline()))) + "\n")


def answered(request: dict) -> dict:
    """What a fork has said in the end."""
    told = [Path(request["work"]) / name for name in (".stdout", ".stderr")]
    child = os.fork()
    if child == 0:
        os._exit(as_asked(request, told))
    _, status = os.waitpid(child, 0)
    out, err = (file.read_text() for file in told)
    return {"returncode": os.waitstatus_to_exitcode(status), "stdout": out, "stderr": err}


def as_asked(request: dict, told: list[Path]) -> int:
    """In the fork: the script, as a Python of its own would run it."""
    os.environ.clear()
    os.environ.update(request["environment"])
    modules.HF_MODULES_CACHE = request["environment"]["HF_MODULES_CACHE"]
    os.chdir(request["work"])
    for stream, file in zip((1, 2), told, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv = request["arguments"]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr, flush=True)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    main(sys.argv[1])
