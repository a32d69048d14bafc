"""An OpenAI-style image server whose times are known, as a process: `stub_server.py --port P`.

A picture takes `--overhead` plus `--step` seconds per forward, drawn one at a time. It is noise
that follows from prompt, seed and size, and differs a little for every policy but bf16_base.
"""

import argparse
import base64
import hashlib
import io
import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

STUB = Path(__file__).resolve()
CHILD = [sys.executable, "-c", "import time; time.sleep(600)"]


def launch_command(*options: object) -> str:
    """For --launch: every policy gets a stub of its own."""
    words = [sys.executable, STUB, "--port", "{port}", "--model", "{model}", "--policy", "{policy}"]
    return " ".join(map(str, (*words, *options)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="stub")
    parser.add_argument("--policy", default="bf16_base")
    parser.add_argument("--step", type=float, default=0.0)
    parser.add_argument("--overhead", type=float, default=0.0)
    parser.add_argument("--attention", default="stub attention")
    parser.add_argument("--requests", type=Path, help="append one line per request to this file")
    # How it misbehaves:
    parser.add_argument("--always-guided", action="store_true")
    parser.add_argument("--ignores", nargs="*", default=[], help="fields of requests")
    parser.add_argument("--counts-forwards", type=int, help="the nfe that it reports per step")
    parser.add_argument("--size", help="of every picture, whatever is asked")
    parser.add_argument("--flat", action="store_true")
    parser.add_argument("--same", action="store_true")
    parser.add_argument("--labelled", action="store_true", help="tell every request in its file")
    parser.add_argument("--refuses-guidance", action="store_true")
    parser.add_argument("--unrepeatable", action="store_true")
    parser.add_argument("--dies-after", type=int, help="requests")
    parser.add_argument("--only-policy", help="misbehave as asked only under this policy")
    parser.add_argument("--with-child", action="store_true", help="in a session of its own")
    return parser.parse_args()


class Stub:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.turn = threading.Lock()
        self.num_asked = 0

    @property
    def misbehaves(self) -> bool:
        return self.options.only_policy in (None, self.options.policy)

    def answer(self, body: dict) -> dict:
        with self.turn:
            return self._answer(body)

    def _answer(self, body: dict) -> dict:
        options = self.options
        self.num_asked += 1
        if options.requests:
            with options.requests.open("a") as file:
                file.write(json.dumps({"policy": options.policy, **body}) + "\n")
        if self.misbehaves and options.dies_after and self.num_asked > options.dies_after:
            sys.stderr.write("out of memory\n")
            sys.stderr.flush()
            subprocess.os._exit(3)
        ignored = options.ignores if self.misbehaves else []
        body = {key: value for key, value in body.items() if key not in ignored}
        steps, guidance = body.get("num_inference_steps", 50), body.get("guidance_scale", 0.0)
        is_guided = guidance > 0 or (self.misbehaves and options.always_guided)
        time.sleep(options.overhead + options.step * steps * (1 + is_guided))
        answer = {"created": 1, "data": [{"b64_json": self.draw(body, guidance)}]}
        if options.counts_forwards and self.misbehaves:
            answer["zimage_fp8"] = self.facts(steps, options.counts_forwards * steps)
        elif options.counts_forwards:
            answer["zimage_fp8"] = self.facts(steps, steps)
        return answer

    def facts(self, steps: int, nfe: int) -> dict:
        options = self.options
        return {
            "policy": options.policy, "steps": steps, "nfe": nfe, "guidance": 0.0,
            "sigmas": [1.0, 0.0], "timings_s": {"denoise": options.step * steps},
            # Counted anew for every request, as vLLM-Omni does it.
            "peak_memory_bytes": {"torch_reserved": 2**30 if self.num_asked == 2 else 2**29},
            "server": {"device": "stub", "attention": options.attention},
        }  # fmt: skip

    def draw(self, body: dict, guidance: float) -> str:
        options = self.options
        bad = self.misbehaves
        size = options.size if bad and options.size else body["size"]
        width, height = map(int, size.split("x"))
        seen = "" if bad and options.same else f"{body['prompt']} {body.get('seed')} {guidance}"
        if bad and options.unrepeatable:
            seen += f" {self.num_asked}"
        random = np.random.default_rng(int(hashlib.sha256(seen.encode()).hexdigest()[:8], 16))
        pixels = random.integers(40, 216, (height, width, 3)).astype(np.int16)
        if options.policy != "bf16_base":
            strength = 2 + len(options.policy) % 5
            pixels += random.integers(-strength, strength + 1, pixels.shape).astype(np.int16)
        if bad and options.flat:
            pixels[:] = 0
        buffer = io.BytesIO()
        texts = PngInfo()
        if options.labelled:
            texts.add_text("parameters", f"{body} {self.num_asked}")
        image = Image.fromarray(pixels.astype(np.uint8))
        image.save(buffer, "PNG", compress_level=1, pnginfo=texts)
        return base64.b64encode(buffer.getvalue()).decode()


def serve(options: argparse.Namespace) -> None:
    stub = Stub(options)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            known = {"/health": {}, "/v1/models": {"data": [{"id": options.model}]}}
            self.reply(200 if self.path in known else 404, known.get(self.path, {}))

        def do_POST(self) -> None:
            length = int(self.headers["content-length"])
            body = json.loads(self.rfile.read(length))
            if options.refuses_guidance and body["guidance_scale"]:
                self.reply(400, {"error": {"message": "this model knows no guidance"}})
            else:
                self.reply(200, stub.answer(body))

        def reply(self, status: int, answer: dict) -> None:
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    if options.with_child:
        child = subprocess.Popen(CHILD, start_new_session=True)
        sys.stdout.write(f"child {child.pid}\n")
        sys.stdout.flush()
    server = ThreadingHTTPServer(("127.0.0.1", options.port), Handler)
    server.daemon_threads = True
    server.serve_forever()


if __name__ == "__main__":
    serve(parse())
