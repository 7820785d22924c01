"""A served model -> how it stands a load: throughput, latency, lost and mixed answers, and memory.

    python examples/triton_client/load.py --model my-llm --seconds 60 --concurrency 1 4 16 64 --pid PID
    python examples/triton_client/load.py --model my-llm --cancel 1000

Every worker sends greedy requests to /generate_stream one after another, over prompts that all workers share. What a
prompt was answered first, alone, it must be answered always: an answer that differs is lost or mixed with another's, or
two tokens tied. Needs Python and nothing else.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import sys
import threading
import time
from pathlib import Path

BEGINNINGS = ("def ", "class ", "import ", "    return ", "    if ", "self.", "for i in ", '"""', "# ", "raise ")
ENDINGS = ("get", "_name", "x", "a list of ", "value", "None", "os", "test", "read", "self", "error", "str", "is ")
PROMPTS = [beginning + ending for beginning in BEGINNINGS for ending in ENDINGS]


class Client:
    """One connection to a model that is kept open."""

    def __init__(self, address: str, model: str) -> None:
        host, _, port = address.partition(":")
        self.connection = http.client.HTTPConnection(host, int(port), timeout=120)
        self.path = f"/v2/models/{model}/generate_stream"

    def ask(self, prompt: str, tokens: int) -> tuple[str, int, float]:
        """The answer, its tokens, and the seconds to its first piece."""
        body = {"text_input": prompt, "max_tokens": tokens, "stream": True, "return_num_output_tokens": True}
        began = time.monotonic()
        self.connection.request("POST", self.path, json.dumps(body))
        response = self.connection.getresponse()
        text, count, first = "", 0, 0.0
        for line in iter(response.readline, b""):
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"])
                first = first or time.monotonic() - began
                text += event["text_output"]
                count += event["num_output_tokens"]
        return text, count, first


def run(address: str, model: str, concurrency: int, seconds: float, tokens: int, known: dict[str, str]) -> dict:
    """Load for some seconds.

    Args:
        known: prompt -> answer; prompts that are not in it are asked alone before the load begins.
    """
    alone = Client(address, model)
    for prompt in PROMPTS:
        if prompt not in known:
            known[prompt] = alone.ask(prompt, tokens)[0]
    alone.connection.close()
    lock, errors, wrong, firsts = threading.Lock(), [], [], []
    done = {"requests": 0, "tokens": 0}
    end = time.monotonic() + seconds

    def work(index: int) -> None:
        client, number = Client(address, model), index
        while time.monotonic() < end:
            prompt = PROMPTS[number * 7 % len(PROMPTS)]  # 7 has no factor in common with 130: all have their turn
            number += concurrency
            try:
                text, count, first = client.ask(prompt, tokens)
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                with lock:
                    errors.append(f"{type(error).__name__}: {error}")
                client = Client(address, model)
                continue
            with lock:
                done["requests"] += 1
                done["tokens"] += count
                firsts.append(first)
                if text != known[prompt]:
                    wrong.append({"prompt": prompt, "wanted": known[prompt], "got": text})
        client.connection.close()

    began = time.monotonic()
    workers = [threading.Thread(target=work, args=(index,)) for index in range(concurrency)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    took = time.monotonic() - began
    firsts.sort()
    return {
        "concurrency": concurrency,
        "seconds": round(took, 1),
        **done,
        "tokens_per_second": round(done["tokens"] / took, 1),
        "first_piece_seconds_median": round(firsts[len(firsts) // 2], 3) if firsts else None,
        "first_piece_seconds_p99": round(firsts[len(firsts) * 99 // 100], 3) if firsts else None,
        "errors": errors,
        "different": wrong,
    }


def cancel(address: str, model: str, count: int, at_once: int = 16) -> dict:
    """Begin streams of many tokens and go away: half of them at once, half after the first piece.

    Args:
        at_once: no more than the model has slots, or the first piece waits for an answer to end.
    """
    body = json.dumps({"text_input": "import ", "max_tokens": 1000, "stream": True}).encode()
    head = f"POST /v2/models/{model}/generate_stream HTTP/1.1\r\nHost: {address}\r\nContent-Length: {len(body)}\r\n\r\n"
    host, _, port = address.partition(":")
    began, left = time.monotonic(), count
    while left:
        sockets = [socket.create_connection((host, int(port)), timeout=60) for _ in range(min(at_once, left))]
        for one in sockets:
            one.sendall(head.encode() + body)
        for one in sockets[::2]:
            one.recv(1)
        for one in sockets:
            one.close()
        left -= len(sockets)
    return {"cancelled": count, "seconds": round(time.monotonic() - began, 1)}


def resident_bytes(pid: int) -> int:
    """Memory of a process and its children (Linux)."""
    pages, whole = 0, [pid]
    while whole:
        process = Path("/proc") / str(whole.pop())
        pages += int((process / "statm").read_text().split()[1])
        for task in (process / "task").iterdir():
            whole += map(int, (task / "children").read_text().split())
    return pages * 4096


def main() -> int:
    """Print one line of JSON for every load; the exit code is 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="127.0.0.1:8000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--cancel", type=int, default=0, metavar="N", help="cancel so many requests first")
    parser.add_argument("--pid", type=int, help="of tritonserver, to see its memory")
    options = parser.parse_args()
    if options.cancel:
        print(json.dumps(cancel(options.address, options.model, options.cancel)), flush=True)
    known: dict[str, str] = {}
    good = True
    for concurrency in options.concurrency:
        memory = {}
        if options.pid:
            run(options.address, options.model, concurrency, min(10, options.seconds), options.tokens, known)  # warm
            memory["memory_before"] = resident_bytes(options.pid)
        report = run(options.address, options.model, concurrency, options.seconds, options.tokens, known)
        if options.pid:
            memory["memory_after"] = resident_bytes(options.pid)
        print(json.dumps(report | memory), flush=True)
        good = good and not report["errors"] and not report["different"]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
