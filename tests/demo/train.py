"""Train the demo checkpoint from scratch on the questions in this folder, check it, and write it.

    python -m tests.demo.train [--output DIR] [--num-steps N]

AdamW with a cosine schedule on random conversations; the loss is taken on answers only. Before anything is written,
the weights are rounded to BF16, as they will be stored, and asked every question: when fewer than 98 % of the trained
or 85 % of the held-out phrasings are answered exactly, nothing is written.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from torch.nn import functional
from transformers import MistralConfig, MistralForCausalLM

from backend.errors import ConfigError
from tests.demo.augment import Augmenter, unrelated_words
from tests.demo.conversation import BOS_ID, EOS_ID, PAD_ID, ChatTokens, TrainingRow
from tests.demo.evaluate import CHECKPOINT, Score, all_cases, generate, grade, scores
from tests.demo.make_tekken import NUM_SPECIAL_TOKENS, VOCAB_SIZE, write_tekken
from tests.demo.questions import read_data

MIN_TRAINED_SHARE = 0.98
MIN_HELD_OUT_SHARE = 0.85
_ROWS_PER_POOL = 32  # batches that are drawn together, so that rows of similar length can share one
_TRAINING_JSON = "training.json"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, but for the bits of the processor's arithmetic."""

    seed: int = 2407
    num_steps: int = 1800
    rows_per_batch: int = 16
    peak_learning_rate: float = 2e-3
    warmup_steps: int = 60
    weight_decay: float = 0.1
    max_gradient_norm: float = 1.0
    question_noise: float = 0.03  # share of the question's tokens that are replaced by random ones


def demo_config() -> MistralConfig:
    """The shape of the demo: as Mistral NeMo 4 query heads per KV head, heads x head_dim != hidden, an untied head."""
    return MistralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=128,
        hidden_act="silu",
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        sliding_window=None,
        tie_word_embeddings=False,
        attention_dropout=0.0,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=None,
    )


def batches(
    augmenter: Augmenter, recipe: Recipe, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids, is_answer), both [rows, longest], INT64 and BOOL, padded at the right."""
    while True:
        pool = [augmenter.row() for _ in range(_ROWS_PER_POOL * recipe.rows_per_batch)]
        pool.sort(key=lambda row: len(row.ids))
        for place in torch.randperm(_ROWS_PER_POOL, generator=generator).tolist():
            rows = pool[place * recipe.rows_per_batch : (place + 1) * recipe.rows_per_batch]
            yield _with_noise(*_padded(rows), recipe.question_noise, generator)


def train(model: MistralForCausalLM, augmenter: Augmenter, recipe: Recipe) -> float:
    """Train `model` in place and return the mean loss of the last 100 steps, in nats per answer token."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    norms = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak_learning_rate, betas=(0.9, 0.98))
    source = batches(augmenter, recipe, torch.Generator().manual_seed(recipe.seed))
    losses: list[float] = []
    num_tokens, started = 0, time.perf_counter()
    model.train()
    for step in range(1, recipe.num_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        ids, is_answer = next(source)
        # Causal attention, so padding at the right needs no mask; the head runs only where there is something to learn.
        hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state[is_answer[:, 1:]]
        loss = functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][is_answer[:, 1:]])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_gradient_norm)
        optimizer.step()
        losses.append(loss.item())
        num_tokens += ids.numel()
        if step % 20 == 0 or step == recipe.num_steps:
            seconds = time.perf_counter() - started
            eta_s = seconds / step * (recipe.num_steps - step)
            mean = sum(losses[-20:]) / len(losses[-20:])
            rate = f"{num_tokens / seconds:.0f} tokens/s  eta {eta_s:.0f} s"
            print(f"step {step}/{recipe.num_steps}  loss {mean:.4f}  {rate}", flush=True)
    return sum(losses[-100:]) / len(losses[-100:])


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up to the peak, then half a cosine down to 1 % of it."""
    if step < recipe.warmup_steps:
        return recipe.peak_learning_rate * step / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.num_steps - recipe.warmup_steps)
    return recipe.peak_learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def _padded(rows: list[TrainingRow]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([[*row.ids, *[PAD_ID] * (width - len(row.ids))] for row in rows])
    is_answer = torch.tensor([[*row.is_answer, *[False] * (width - len(row.ids))] for row in rows])
    return ids, is_answer


def _with_noise(
    ids: torch.Tensor, is_answer: torch.Tensor, share: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    # A question is understood by several of its words then, not by one. Answers and control tokens stay.
    hit = (torch.rand(ids.shape, generator=generator) < share) & ~is_answer & (ids >= NUM_SPECIAL_TOKENS)
    noise = torch.randint(NUM_SPECIAL_TOKENS, VOCAB_SIZE, ids.shape, generator=generator)
    return torch.where(hit, noise, ids), is_answer


def _round_to_bf16(model: MistralForCausalLM) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16().float())
    model.train(False)


def _rounded(score: Score) -> dict[str, float]:
    return {**asdict(score), "median_margin": round(score.median_margin, 2), "share": round(score.share, 4)}


def main() -> int:
    """Train, evaluate, write; returns 1, having written nothing, when the answers are not good enough."""
    parser = argparse.ArgumentParser(prog="python -m tests.demo.train", description="Train the demo checkpoint.")
    parser.add_argument(
        "--output", type=Path, default=CHECKPOINT, help="folder to write (default: the shipped checkpoint)"
    )
    parser.add_argument(
        "--num-steps", type=int, default=Recipe.num_steps, help="optimizer steps (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.num_steps < 1:
        raise ConfigError(f"--num-steps: must be >= 1, found {arguments.num_steps}")
    recipe, data = Recipe(num_steps=arguments.num_steps), read_data()
    torch.manual_seed(recipe.seed)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        tokens = ChatTokens(write_tekken(Path(scratch)))
    words = unrelated_words(data, [tokens.decode([i]) for i in range(NUM_SPECIAL_TOKENS, VOCAB_SIZE)])
    model = MistralForCausalLM(demo_config())
    print(
        f"{sum(weight.numel() for weight in model.parameters()):,} parameters, {len(words)} unrelated words", flush=True
    )
    final_loss = train(model, Augmenter(data, tokens, words, recipe.seed), recipe)
    train_s = time.perf_counter() - started

    _round_to_bf16(model)
    grades = grade(model, tokens, list(all_cases(data, tokens)))
    for graded in grades:
        if not graded.is_right:
            print(
                f"WRONG | {graded.case.kind} | {graded.case.asked} | {generate(model, tokens, graded.case)}", flush=True
            )
    found = scores(grades)
    trained_margins = sorted(graded.margin for graded in grades if graded.case.kind == "trained")
    report = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "train_s": round(train_s),
        "recipe": asdict(recipe),
        "final_loss": round(final_loss, 5),
        "answered_exactly": {kind: _rounded(score) for kind, score in found.items()},
        "trained_margin_min": round(trained_margins[0], 2),
        "trained_margin_percentile_1": round(trained_margins[len(trained_margins) // 100], 2),
    }
    print(json.dumps(report, indent=2))
    if found["trained"].share < MIN_TRAINED_SHARE or found["held_out"].share < MIN_HELD_OUT_SHARE:
        limits = f"{MIN_TRAINED_SHARE:.0%} of trained and {MIN_HELD_OUT_SHARE:.0%} of held-out phrasings"
        print(f"not written: {limits} must be answered exactly", file=sys.stderr)
        return 1
    arguments.output.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(arguments.output)
    (arguments.output / "model.safetensors").chmod(0o644)  # safetensors leaves it readable for its owner alone
    write_tekken(arguments.output)
    (arguments.output / _TRAINING_JSON).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
