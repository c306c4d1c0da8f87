"""How fast the demo model is: start-up, first token, one stream, sixteen streams; transformers beside it.

    python -m tests.bench.bench_demo [--device cpu|cuda] [--skip-start]

Checks first that the engine answers what transformers answers, greedily, with and without a picture.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from engine import (
    ChatMessage,
    Engine,
    EngineConfig,
    Finished,
    ImagePart,
    Request,
    SamplingParams,
    TextDelta,
    TextPart,
)
from tests.bench.results_file import ROOT, save

MODEL = ROOT / "assets" / "demo_model"
PICTURE = sorted((ROOT / "assets" / "samples").glob("*.png"))[0]
NUM_TOKENS = 200
REPEATS = 5
PORT = 7899


def main() -> None:
    """Measure, print a table, save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--skip-start", action="store_true", help="do not time app.py's start")
    parser.add_argument("--output", type=Path, help="folder for the JSON instead of results/")
    arguments = parser.parse_args()
    check_same_answers(arguments.device)
    figures = {} if arguments.skip_start else measure_start(arguments.device)
    engine = Engine.load(EngineConfig(model=MODEL, device=arguments.device))
    figures |= measure_engine(engine) | Peer(arguments.device, engine.dtype).measure()
    engine.close()
    for name, value in figures.items():
        print(f"{name:44} {value:10.3f}")
    folder = {} if arguments.output is None else {"folder": arguments.output}
    print("saved", save(f"demo_model_{arguments.device}", figures, **folder))


def measure_start(device: str) -> dict:
    """Seconds from the command to a page, and to the first answer through the API."""
    command = [sys.executable, "app.py", "--server-port", str(PORT), "--device", device]
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            _poll(f"http://127.0.0.1:{PORT}/", None)
            page = time.perf_counter() - began
            body = {
                "model": MODEL.name,
                "messages": [{"role": "user", "content": "Hello!"}],
                "max_tokens": 5,
            }
            _poll(f"http://127.0.0.1:{PORT}/v1/chat/completions", body)
            answer = time.perf_counter() - began
        finally:
            process.terminate()
    return {"start_to_page_s": page, "start_to_first_answer_s": answer}


def _poll(url: str, body: dict | None) -> None:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                response.read()
            return
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def measure_engine(engine: Engine) -> dict:
    """Wall-clock rates of whole requests for 1 and 16 streams, and first tokens (nothing cached)."""
    single = [timed(engine, [request("Tell me a story.")]) for _ in range(REPEATS)]
    many = [
        timed(engine, [request(f"Tell me story {n}.") for n in range(16)]) for _ in range(REPEATS)
    ]
    figures = {
        "engine_1_stream_tok_s": NUM_TOKENS / _median(seconds for seconds, _ in single),
        "engine_16_streams_tok_s": 16 * NUM_TOKENS / _median(seconds for seconds, _ in many),
        "engine_first_token_text_s": _median(ends[0].timing.first_token_s for _, ends in single),
    }
    described = []
    for shade in range(REPEATS):  # each differs in a corner, so no KV or feature is shared
        picture = Image.open(PICTURE).convert("RGB")
        picture.paste((40 * shade, 0, 0), (0, 0, picture.width // 4, picture.height // 4))
        described += timed(engine, [request("Describe this image.", picture)])[1]
    if any(event.usage.cached_tokens for event in described):
        raise SystemExit("The pictures share their KV; first token would be measured too short.")
    figures["engine_first_token_picture_s"] = _median(e.timing.first_token_s for e in described)
    return figures


def timed(engine: Engine, requests: list[Request]) -> tuple[float, list[Finished]]:
    """Seconds from the first request to the last event of all, and those last events."""
    began = time.perf_counter()
    ends = run(engine, requests)
    return time.perf_counter() - began, ends


def request(text: str, picture: Image.Image | None = None, tokens: int = NUM_TOKENS) -> Request:
    parts = (TextPart(text),) if picture is None else (ImagePart(picture), TextPart(text))
    params = SamplingParams(temperature=0, max_new_tokens=tokens, ignore_eos=True)
    return Request((ChatMessage("user", parts),), params)


def run(engine: Engine, requests: list[Request]) -> list[Finished]:
    """Run requests at the same time, each read by its own thread; their last events."""
    ends: list[Finished | None] = [None] * len(requests)

    def read(index: int) -> None:
        *_, ends[index] = engine.stream(requests[index])

    threads = [threading.Thread(target=read, args=(n,)) for n in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


class Peer:
    """transformers on the same folder, device and dtype."""

    def __init__(self, device: str, dtype: str) -> None:
        self.processor = AutoProcessor.from_pretrained(MODEL)
        loaded = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=getattr(torch, dtype))
        self.model = loaded.to(device).eval()
        self.model.generation_config.eos_token_id = None  # every answer runs to its full length

    def inputs(self, text: str, picture: Image.Image | None = None) -> dict:
        image = [] if picture is None else [{"type": "image", "image": picture}]
        messages = [{"role": "user", "content": [*image, {"type": "text", "text": text}]}]
        inputs = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return inputs.to(self.model.device)

    @torch.inference_mode()
    def generate(self, inputs: dict, tokens: int) -> list[list[int]]:
        """Greedy, exactly `tokens` new tokens a row."""
        output = self.model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    def measure(self) -> dict:
        single = self.inputs("Tell me a story.")
        batch = {name: tensor.repeat(16, 1) for name, tensor in single.items()}
        picture = self.inputs("Describe this image.", Image.open(PICTURE).convert("RGB"))
        return {
            "transformers_1_stream_tok_s": NUM_TOKENS / self._seconds(single, NUM_TOKENS),
            "transformers_16_rows_tok_s": 16 * NUM_TOKENS / self._seconds(batch, NUM_TOKENS),
            "transformers_first_token_picture_s": self._seconds(picture, 1),
        }

    def _seconds(self, inputs: dict, tokens: int) -> float:
        seconds = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            self.generate(inputs, tokens)
            seconds.append(time.perf_counter() - began)
        return _median(seconds)


def check_same_answers(device: str) -> None:
    """Stop unless both give the same greedy answers, in fp32: half types may differ in a near tie."""
    engine = Engine.load(EngineConfig(model=MODEL, device=device, dtype="float32"))
    peer = Peer(device, "float32")
    picture = Image.open(PICTURE).convert("RGB")
    for text, image in itertools.product(["Describe this image.", "Who are you?"], [None, picture]):
        events = engine.stream(request(text, image, tokens=40))
        ours = [t for event in events if isinstance(event, TextDelta) for t in event.token_ids]
        theirs = peer.generate(peer.inputs(text, image), 40)[0]
        if ours != theirs:
            raise SystemExit(f"{text!r}: the engine answers {ours}, transformers {theirs}.")
    engine.close()


def _median(values) -> float:
    return statistics.median(values)


if __name__ == "__main__":
    main()
