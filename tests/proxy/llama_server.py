"""A real llama-server with the embedded LM, in a process of its own."""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import xllamacpp

NAME = "embedded"
NUM_SLOTS = 4
SLOT_TOKENS = 1024
"""Context of each slot; all that the embedded LM has."""


@dataclass(frozen=True)
class LlamaServer:
    """A running server."""

    url: str
    """Without a path: http://127.0.0.1:PORT."""
    process: subprocess.Popen[str]

    def get(self, path: str) -> Any:
        """What it tells there."""
        with urlopen(self.url + path, timeout=600) as response:
            return json.load(response)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer, which is a list of events if `body` asks for a stream."""
        request = Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urlopen(request, timeout=600) as response:
            if not body.get("stream"):
                return json.load(response)
            lines = [line.decode().strip().removeprefix("data: ") for line in response]
            return [json.loads(line) for line in lines if line and line != "[DONE]"]

    def kill(self) -> None:
        """As if the machine had failed: open connections end amid whatever they carry."""
        self.process.kill()
        self.process.wait()


@contextmanager
def llama_server(model: Path, num_slots: int = NUM_SLOTS, port: int = 0) -> Iterator[LlamaServer]:
    """Serves a GGUF file on the loopback interface until the block is left.

    Args:
        model: The file.
        num_slots: Requests at once.
        port: 0 for a free one.
    """
    with subprocess.Popen(
        [sys.executable, __file__, str(model), str(num_slots), str(port)],
        stdin=subprocess.PIPE,  # ends with this process, and the server with it
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        server = LlamaServer(process.stdout.readline().strip(), process)
        try:
            assert server.url, "llama-server did not start: what it said is on stderr"
            yield server
        finally:
            server.kill()


def serve(model: str, num_slots: int, port: int) -> None:
    """Prints the address once requests are taken; ends with stdin."""
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.model_alias = {NAME}
    params.port = port
    params.n_parallel = num_slots
    params.n_ctx = num_slots * SLOT_TOKENS
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # Half precision, that of flash attention too, moves log probabilities by 0.01 and more.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.slot_prompt_similarity = 0.8  # as docs/SERVING.md says for thoughts in turns
    params.sampling.samplers = "temperature"  # as traces are recorded
    params.cache_ram_mib = 0  # what no slot has any more is computed anew, and never found again
    params.warmup = False
    params.endpoint_metrics = True
    params.verbosity = 1  # errors only
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


def main() -> None:
    """Serves by hand until Ctrl+D; what is wrong with the arguments is told behind the usage."""
    parser = argparse.ArgumentParser(description="Serves a GGUF file until you press Ctrl+D.")
    parser.add_argument("model", type=Path, help="the file")
    told = f"requests at once, {NUM_SLOTS} by default"
    parser.add_argument("slots", type=int, nargs="?", default=NUM_SLOTS, help=told)
    told = "where it listens on the loopback interface; a free one by default"
    parser.add_argument("port", type=int, nargs="?", default=0, help=told)
    asked = parser.parse_args()
    if not asked.model.is_file():
        parser.error(f"{asked.model}: no such file")
    if asked.slots < 1:
        parser.error(f"slots is {asked.slots}, expected 1 or more")
    if not 0 <= asked.port < 2**16:
        parser.error(f"port is {asked.port}, expected 0 to 65535")
    try:
        with socket.socket() as tried:  # the server itself does not say why it has none
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(("127.0.0.1", asked.port))
    except OSError as error:
        told = f"cannot listen at port {asked.port}: {error.strerror}"
        parser.error(f"{told}; end what listens there, or name another port")
    try:
        serve(str(asked.model), asked.slots, asked.port)
    except RuntimeError as error:
        parser.error(f"{asked.model} cannot be served, expected a GGUF file of an LM: {error}")


if __name__ == "__main__":
    main()
