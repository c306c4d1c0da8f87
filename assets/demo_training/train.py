"""Train the demo model from scratch within a time budget and save it in the Hugging Face layout.

    python -m assets.demo_training.train --output DIR --minutes 9

Pictures and text are made by worker processes while the GPU trains, so no example is seen twice
(`--reuse` may repeat batches where the processors are too slow). The learning rate follows the clock:
a run of any length ends fully decayed, saved and measured.
"""

import argparse
import itertools
import json
import platform
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import LlavaForConditionalGeneration

from assets.demo_training import conversations, heldout, scenes
from assets.demo_training import model as demo
from assets.demo_training.muon import Muon
from assets.demo_training.save import save_folder

HERE = Path(__file__).resolve().parent


class Batches(IterableDataset):
    """An endless stream of training batches, each made by one worker."""

    def __init__(self, tokenizer_file: Path, rows: int, text_rows: int, seed: int) -> None:
        self.tokenizer_file, self.rows, self.text_rows, self.seed = (
            tokenizer_file,
            rows,
            text_rows,
            seed,
        )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        torch.set_num_threads(1)
        info = get_worker_info()
        worker = info.id if info else 0
        maker = conversations.RowMaker(Tokenizer.from_file(str(self.tokenizer_file)))
        seeds = itertools.count((self.seed * 128 + worker) << 26)
        rng = random.Random(f"text-{self.seed}-{worker}")
        while True:
            batch = maker.image_rows(seeds, self.rows, self.rows // 16)
            batch |= maker.text_rows(rng, self.text_rows)
            yield {name: torch.from_numpy(array) for name, array in batch.items()}


class Trainer:
    """Model, optimizers and the compiled losses of one run."""

    def __init__(self, args: argparse.Namespace, tokenizer: Tokenizer) -> None:
        self.args, self.device = args, torch.device(args.device)
        ids = [tokenizer.token_to_id(t) for t in conversations.SPECIALS]
        torch.manual_seed(args.seed)
        if args.start:
            self.model = LlavaForConditionalGeneration.from_pretrained(
                args.start, dtype=torch.float32
            )
        else:
            config = demo.build_config(tokenizer.get_vocab_size(), ids[0], ids[2], ids[3])
            self.model = LlavaForConditionalGeneration(config)
            scale_init(self.model)
        self.model.to(self.device)
        classes = (len(scenes.SHAPES) + 2, len(scenes.COLOURS) + 1, len(scenes.CHARS) + 1)
        self.heads = demo.PatchHeads(self.model.config.vision_config.hidden_size, classes).to(
            self.device
        )
        matrices, others = split_parameters(self.model)
        others += list(self.heads.parameters())
        self.muon = Muon(matrices)
        fused = self.device.type == "cuda"
        self.adam = torch.optim.AdamW(
            others, lr=args.lr, betas=(0.9, 0.97), weight_decay=0.01, fused=fused
        )
        compiled = torch.compile if args.compile else (lambda f: f)
        self.image_loss, self.text_loss = compiled(self._image_loss), compiled(self._text_loss)

    def _image_loss(
        self, pixels: Tensor, labels: Tensor, slots: Tensor, ids: Tensor, learn: Tensor
    ) -> tuple:
        features = demo.encode_images(self.model, demo.normalise(pixels))
        x = demo.embed(self.model, ids, features, slots)
        hidden = demo.decode(self.model, x)
        return demo.token_loss(self.model, hidden, ids, learn), self.heads(features, labels)

    def _text_loss(self, ids: Tensor, learn: Tensor) -> Tensor:
        hidden = demo.decode(self.model, demo.embed(self.model, ids, None, None))
        return demo.token_loss(self.model, hidden, ids, learn)

    def step(self, batch: dict[str, Tensor], progress: float, step: int) -> Tensor:
        """One update; returns the image, patch and text losses."""
        b = {name: t.to(self.device, non_blocking=True) for name, t in batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16):
            image, patch = self.image_loss(
                b["pixels"], b["labels"].long(), b["slots"].long(), b["ids"].long(), b["learn"]
            )
            text = self.text_loss(b["text_ids"].long(), b["text_learn"])
            patch_weight = 0.3 if progress < 0.6 else 0.1
            loss = image + patch_weight * patch + self.args.text_weight * text
        loss.backward()
        nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], 1.0, foreach=True)
        lr = self.args.lr * min(1.0, (step + 1) / 150) * min(1.0, max(0.01, (1 - progress) / 0.6))
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.muon.step(lr)
        self.model.zero_grad(set_to_none=True)
        self.heads.zero_grad(set_to_none=True)
        return torch.stack([image.detach(), patch.detach(), text.detach()])


def scale_init(model: LlavaForConditionalGeneration) -> None:
    """Start the patch and position embeddings at a size the first layer norm can work with."""
    tower = model.model.vision_tower.embeddings
    nn.init.normal_(tower.patch_embedding.weight, std=0.05)
    nn.init.normal_(tower.position_embedding.weight, std=0.3)
    nn.init.normal_(tower.class_embedding, std=0.3)


def split_parameters(
    model: LlavaForConditionalGeneration,
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices for Muon; embeddings, norms, biases and the patch convolution for AdamW."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        is_matrix = p.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if is_matrix else others).append(p)
    dead = model.model.vision_tower.post_layernorm  # serves CLIP's pooled output only
    others = [p for p in others if all(p is not q for q in dead.parameters())]
    return matrices, others


@torch.no_grad()
def measure(
    trainer: Trainer, maker: conversations.RowMaker, held: list[heldout.ImageQuestion]
) -> dict[str, float]:
    """Exact match per category: greedy decoding gives the answer iff every argmax along it is right."""
    right: dict[str, list[bool]] = {}
    device = trainer.device
    for at in range(0, len(held), 250):
        part = held[at : at + 250]
        ids = torch.zeros((len(part), 288), dtype=torch.long)
        learn = torch.zeros_like(ids, dtype=torch.bool)
        for row, q in enumerate(part):
            turn = conversations.Turn(f"{conversations.IMAGE}\n{q.question}", q.answer, 1)
            row_ids, row_learn = maker.tokens(conversations.Conversation(None, [turn]))
            ids[row, : len(row_ids)] = torch.tensor(row_ids)
            learn[row, : len(row_ids)] = torch.tensor(row_learn, dtype=torch.bool)
        slots = (ids == maker.image).flatten().nonzero().flatten().to(device)
        pixels = torch.stack(
            [torch.from_numpy(conversations.to_pixels(q.image).copy()) for q in part]
        )
        ids, learn = ids.to(device), learn.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            features = demo.encode_images(trainer.model, demo.normalise(pixels.to(device)))
            hidden = demo.decode(trainer.model, demo.embed(trainer.model, ids, features, slots))
            best = torch.nn.functional.linear(hidden[:, :-1], trainer.model.lm_head.weight).argmax(
                -1
            )
        fine = ((best == ids[:, 1:]) | ~learn[:, 1:]).all(1).tolist()
        for q, ok in zip(part, fine, strict=True):
            right.setdefault(q.category, []).append(ok)
    result = {name: sum(values) / len(values) for name, values in sorted(right.items())}
    result["all"] = sum(map(sum, right.values())) / len(held)
    return result


def run(args: argparse.Namespace) -> dict:
    started = time.time()
    budget_s = args.minutes * 60
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    maker = conversations.RowMaker(tokenizer)
    data = Batches(args.tokenizer, args.rows, args.text_rows, args.seed)
    loader = DataLoader(
        data,
        batch_size=None,
        num_workers=args.workers,
        prefetch_factor=3 if args.workers else None,
        pin_memory=args.device == "cuda",
    )
    batches = iter(loader)
    trainer = Trainer(args, tokenizer)
    held = list(heldout.image_questions(args.held_out))
    print(
        f"ready after {time.time() - started:.0f} s; {sum(p.numel() for p in trainer.model.parameters()):,} parameters"
    )
    history, losses, step, waited = [], [], 0, 0.0
    next_measure, window = time.time() + args.measure_every, time.time()
    while (progress := (time.time() - started) / budget_s) < 1 and step < args.max_steps:
        before = time.time()
        if step % args.reuse == 0:
            batch = next(batches)
        waited += time.time() - before
        losses.append(trainer.step(batch, progress, step))
        step += 1
        if step == 1:
            print(
                f"first step after {time.time() - started:.0f} s: {losses[0].tolist()}", flush=True
            )
        if step % args.log_every == 0:
            image, patch, text = torch.stack(losses).mean(0).tolist()
            rate = args.log_every * args.rows / (time.time() - window)
            print(
                f"{time.time() - started:5.0f} s step {step} image {image:.3f} patch {patch:.3f} text {text:.3f} "
                f"{rate:.0f} conversations/s, waited for data {waited:.1f} s",
                flush=True,
            )
            losses, waited, window = [], 0.0, time.time()
        if time.time() > next_measure:
            accuracy = measure(trainer, maker, held[:900])
            history.append({"seconds": round(time.time() - started), "step": step, **accuracy})
            print("  " + " ".join(f"{k} {v:.3f}" for k, v in accuracy.items()), flush=True)
            next_measure = time.time() + args.measure_every
    trained_s = time.time() - started
    save_folder(trainer.model, args.output, args.max_shard_size)
    unseen = list(heldout.image_questions(600, seed=1, unseen_phrasing=True))
    results = {
        "device": torch.cuda.get_device_name()
        if args.device == "cuda"
        else platform.processor() or "cpu",
        "torch": torch.__version__,
        "commit": commit(),
        "seed": args.seed,
        "started_from": str(args.start) if args.start else None,
        "minutes": round(trained_s / 60, 2),
        "steps": step,
        "conversations": step * args.rows,
        "exact_match": measure(trainer, maker, held),
        "exact_match_unseen_phrasing": measure(trainer, maker, unseen),
        "history": history,
    }
    (args.output / "training.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({k: v for k, v in results.items() if k != "history"}))
    return results


def commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607
        capture_output=True,
        text=True,
        cwd=HERE,
    )
    return found.stdout.strip() or "unknown"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--tokenizer", type=Path, default=HERE.parent / "demo_model" / "tokenizer.json"
    )
    parser.add_argument("--start", type=Path, help="continue from this model folder")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--rows", type=int, default=256, help="image conversations a step")
    parser.add_argument(
        "--text-rows", type=int, default=24, help="packed rows of 1,024 text tokens a step"
    )
    parser.add_argument("--text-weight", type=float, default=0.5)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument(
        "--seed", type=int, default=1, help="below 32, so that held-out seeds stay unseen"
    )
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--reuse", type=int, default=1, help="steps on every batch")
    parser.add_argument("--held-out", type=int, default=2000)
    parser.add_argument("--measure-every", type=float, default=60.0, help="seconds")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--max-shard-size", default="64MB")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    run(parse())
