"""The training loop: one visible `for`, the same on one process, DDP and ZeRO.

A step reads its whole window (accumulation x micro-batches), counts the predicted tokens of all
ranks once, adds the gradient of (sum of token losses) / (that count) micro-batch by micro-batch
(see :class:`train.training.objective.Objective`), then the penalty's gradient once, clips, and
updates. The update is therefore the same for every micro-batch x accumulation x processes that
makes up the global batch.

Everything that a step depends on is a function of its number (samples, learning rate, coefficient,
random seed) or lies in the checkpoint (weights, optimizer state): that is why resuming is exact.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

from sa_models.calibration.token_losses import IGNORED
from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.packing import set_packed_
from train.common.progress import note
from train.common.signals import StopSignal, TrainingStopped
from train.data.blocks import Blocks, PositionSampler
from train.distributed.engines.base import Engine
from train.distributed.engines.start import start
from train.distributed.watchdog import Watchdog
from train.evaluation.perplexity import perplexity
from train.models.checkpointing import enable_checkpointing
from train.models.compiled_layers import compile_errors, compile_layers, release_compiled
from train.models.liger import check_kernels, use_liger_
from train.penalty.coupled import PenaltyResult, penalty_coefficient
from train.penalty.decoupled import Pull
from train.penalty.lora import penalty_of
from train.tracking.metrics_log import Row, Tracker, memory_bytes
from train.tracking.rank_stats import Health
from train.tracking.wandb_run import check_wandb
from train.training.checkpoint import Checkpoints, Position
from train.training.compile_ahead import compile_ahead
from train.training.job import TrainJob
from train.training.objective import Batch, Lessons, Objective
from train.training.optimizer import (
    build_optimizer,
    check_optimizer,
    learning_rate_factor,
    select_trainable,
)
from train.training.training_folder import TrainResult, begin, finish, finished, identity

if TYPE_CHECKING:
    from train.recipe.recipe import Recipe

__all__ = ["TrainJob", "TrainResult", "TrainingStopped", "train"]


def train(job: TrainJob, recipe: Recipe) -> TrainResult:
    """Train for `job.steps` optimizer steps, from the newest checkpoint if there is one.

    Every rank calls it. A training that has finished before returns its result at once.

    Raises:
        PostshareError: the folder holds another run; the loss or a gradient is not finite; a
            checkpoint cannot be read or written; wandb is online without an account; the layers
            cannot be compiled; see :mod:`train.models.liger`, where its kernels are asked for.
        RankLostError: another rank is gone.
        TrainingStopped: SIGINT, SIGTERM or SIGUSR1 arrived; the step was finished, a checkpoint
            written.
    """
    assert recipe.train.precision != "auto", "the run has settled it"
    ours = identity(job, recipe)
    earlier = finished(job.folder, ours, recipe.resume)
    if earlier is not None:
        return earlier
    check_wandb(recipe.wandb)
    engine = start(recipe)
    on_gpu = engine.device.type == "cuda"
    check_kernels(recipe, on_gpu)
    check_optimizer(recipe.train, on_gpu)
    if engine.streams and (source := job.source()) is not None:
        job = replace(job, load=lambda: engine.build(source))
    lessons = None
    if recipe.distill is not None:
        lessons = Lessons(recipe, engine, job.train_blocks, job.steps)
        job = replace(job, train_blocks=lessons.blocks)
    prepare(engine, job, recipe)
    try:
        with compile_errors() if recipe.train.compile else nullcontext():
            return _train(engine, job, recipe, ours, lessons)
    finally:
        engine.close()
        if recipe.train.compile:
            release_compiled(job.model)


def prepare(engine: Engine, job: TrainJob, recipe: Recipe) -> None:
    """Give model and optimizer to the engine."""
    checkpointing = recipe.train.gradient_checkpointing
    if recipe.train.kernels == "liger":
        use_liger_(job.model, rotates_copies=checkpointing == "selective")
    select_trainable(job.model, job.trainable or recipe.train.trainable)
    for parameter in job.model.parameters():
        # A compact model stores o transposed. Fused AdamW pairs weights and moments as they lie in
        # memory, and moments that come from a checkpoint lie as the file has them.
        parameter.data = parameter.data.contiguous()
    enable_checkpointing(job.model, checkpointing)
    if recipe.train.compile:
        compile_layers(job.model)
    optimizer = build_optimizer(job.model, recipe.train, job.learning_rate)
    set_packed_(job.model, False)  # validation would hold what the next step makes stale
    engine.prepare(job.model, optimizer)
    engine.model.train()


def _train(
    engine: Engine, job: TrainJob, recipe: Recipe, ours: dict[str, Any], lessons: Lessons | None
) -> TrainResult:
    section = recipe.train
    penalty, pull, lm_weight, penalty_weight = None, None, 1.0, 0.0
    if job.plan is not None and job.plan.ties:
        layout = HeadLayout.from_config(job.model.config)
        lm_weight, penalty_weight = recipe.penalty.weights
        if recipe.penalty.mode == "coupled":
            penalty = penalty_of(job.model, job.plan, layout, recipe)
        else:
            pull = Pull(job.plan, layout, recipe.penalty)
    objective = Objective(engine, job.model, recipe, lm_weight, lessons)

    # --- where it stands
    begin(job.folder, ours, engine)
    checkpoints = Checkpoints(
        job.folder / "checkpoints",
        engine,
        ours,
        section.keep_checkpoints,
        section.keep_best,
        note,
    )
    at = checkpoints.resume()
    samples = PositionSampler(
        len(job.train_blocks),
        batch_size=section.batch_size,
        micro_batch_size=section.micro_batch_size,
        seed=recipe.seed,
        rank=engine.rank,
        world=engine.world,
        position=at.step * section.batch_size,
        steps=job.steps - at.step,
    )
    if section.compile and at.step < job.steps:
        first = default_collate([job.train_blocks[index] for index in next(iter(samples))])
        compile_ahead(objective, first, job.name, section.hang_timeout)
    began = time.perf_counter() - at.seconds
    tracker = Tracker(
        job.name,
        recipe,
        job.folder,
        job.steps,
        at.step,
        at.wandb_run_id,
        engine.is_main,
        job.group,
        job.later_steps,
    )
    batches = read_ahead(job.train_blocks, samples, 2 * samples.accumulation)
    watch = Watchdog(engine.rank, engine.world, section.hang_timeout)
    health = Health(engine, job.model, section.health_every)

    with StopSignal() as stop, tracker, closing(batches), closing(checkpoints), watch:
        for step in range(at.step, job.steps):
            step_began = time.perf_counter()
            seed_step(recipe.seed, step, engine.rank)
            watch.note("reading data", step + 1)
            health.begin(step + 1)

            # 1. The window: what this rank reads, and how many tokens all ranks predict in it.
            window = [next(batches) for _ in range(samples.accumulation)]
            data_wait = time.perf_counter() - step_began
            watch.note("counting tokens")
            own = sum(predicted_tokens(batch) for batch in window)
            predicted = int(engine.reduce_sum(own))
            if predicted == 0:
                raise PostshareError(
                    f"step {step + 1}: no token is predicted; check the documents of data.train"
                )

            # 2. The losses of the tokens: their means over the window, and the total's gradient.
            sums = torch.zeros(len(objective.weights), dtype=torch.float64, device=engine.device)
            for micro, batch in enumerate(window):
                watch.note("forward and backward")
                with engine.micro_step(boundary=micro == len(window) - 1):
                    total, losses = objective(batch)
                    engine.backward(total / predicted)
                sums += torch.stack(list(losses.values())) / predicted
            stop_here = sums.new_tensor([float(stop.received)])
            *means, stopping = engine.reduce_sum(torch.cat([sums, stop_here])).tolist()
            means = dict(zip(losses, means, strict=True))
            lm = float(sums[0])
            for name, value in means.items():
                if not math.isfinite(value):
                    culprits = health.culprits(lm) if name == "lm_loss" else ""
                    require_finite(name.replace("_", " ") + culprits, value, step, checkpoints)

            # 3. The penalty: once a step, on the weights alone.
            watch.note("penalty")
            pulled = None
            coefficient = 0.0
            if penalty is not None:
                coefficient = penalty_weight * penalty_coefficient(step, recipe.penalty)
                pulled = penalty.apply(engine, coefficient or None)
                require_finite("penalty", pulled.value, step, checkpoints)

            # 4. The update: clip, step; then what pulls the weights and not the loss.
            watch.note("optimizer step")
            learning_rate = job.learning_rate * learning_rate_factor(step, job.steps, section)
            engine.set_learning_rate(learning_rate)
            gradient_norm = engine.step()
            require_finite("gradient norm", gradient_norm, step, checkpoints)
            if pull is not None:
                watch.note("pull")
                pulled = pull.apply(engine, step, learning_rate)
                require_finite("penalty", pulled.value, step, checkpoints)
            if step == at.step:
                engine.check_replicas()

            # 5. What came of it.
            checkpoints.poll()
            now = time.perf_counter()
            at = Position(
                step=step + 1,
                samples=(step + 1) * section.batch_size,
                tokens=at.tokens + predicted,
                seconds=now - began,
                wandb_run_id=tracker.wandb_run_id,
            )
            row: Row = {
                "step": at.step,
                "tokens": at.tokens,
                **means,
                **penalty_row(pulled),
                "total_loss": objective.total(means)
                + coefficient * (pulled.value if pulled else 0.0),
                "gradient_norm": gradient_norm,
                "learning_rate": learning_rate,
                "seconds": at.seconds,
                "step_seconds": now - step_began,
                "tokens_per_second": predicted / (now - step_began),
                "data_wait_seconds": data_wait,
                "memory_bytes": memory_bytes(),
                **health.compare(data_wait, lm * predicted / own if own else -math.inf),
            }
            if due(section.evaluate_every, at.step) and job.validation_blocks is not None:
                row |= validate(engine, job.validation_blocks, recipe, watch)
            tracker.log(row, pulled.distance if pulled else None)
            if pulled is not None:
                tracker.log_pairs(at.step, pulled.distance, pulled.cosine)

            # 6. A checkpoint; stopping is a checkpoint too, on all ranks at the same step.
            last = at.step == job.steps
            if not last and (stopping or due(section.checkpoint_every, at.step)):
                watch.note("writing a checkpoint")
                measured = row.get("validation_loss")
                saved = checkpoints.save(replace(at, validation_loss=measured))
                if stopping:
                    checkpoints.wait()
                    raise TrainingStopped(at.step, job.steps, saved, engine.world)

        watch.note("writing the last checkpoint")
        checkpoints.wait()
        watch.note("writing the weights", limited=False)
        result = TrainResult(at.step, at.tokens, at.seconds, job.folder / "weights")
        return finish(job.folder, engine, job.model, recipe, result)


# --- the parts of a step --------------------------------------------------------------------------


def read_ahead(blocks: Blocks, samples: PositionSampler, depth: int) -> Generator[Batch]:
    """Micro-batches of stacked blocks (int64 [micro, length] each), read `depth` ahead.

    One background thread reads: blocks lie in memory-mapped files, so there is little to compute,
    and no process is forked beside a running GPU or communication library.
    """
    # A generator of its own: the loader must not draw from the training's random numbers.
    loader = iter(DataLoader(blocks, batch_sampler=samples, generator=torch.Generator()))
    with ThreadPoolExecutor(1, "read-ahead") as pool:
        ahead = deque(pool.submit(next, loader, None) for _ in range(depth))
        while (batch := ahead.popleft().result()) is not None:
            ahead.append(pool.submit(next, loader, None))
            yield batch


def predicted_tokens(batch: Batch) -> int:
    """Tokens of a micro-batch that are predicted from the ones before them."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make a step's random numbers a function of (seed, step, rank): nothing to checkpoint."""
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> np.uint64(1)))


def require_finite(what: str, value: float, step: int, checkpoints: Checkpoints) -> None:
    """Raises PostshareError for nan and inf; `value` is the same on all ranks, so all raise."""
    if not math.isfinite(value):
        checkpoints.wait()
        last = f"the last good checkpoint is {checkpoints.newest}"
        raise PostshareError(
            f"step {step + 1}: the {what} is {value}; lower train.learning_rate or raise "
            "train.warmup_steps, in another output_dir; "
            + (last if checkpoints.newest else "no checkpoint was written yet")
        )


def penalty_row(pulled: PenaltyResult | None) -> Row:
    """The penalty's columns: distances and cosines over every tie and projection it pulls."""
    if pulled is None:
        return {"penalty": None}
    absent = pulled.distance.isnan()
    merged = (absent | (pulled.distance == 0)).all(1) & ~absent.all(1)
    distance = pulled.distance[~absent]
    cosine = pulled.cosine[~pulled.cosine.isnan()]
    return {
        "penalty": pulled.value,
        "pair_distance_mean": float(distance.mean()),
        "pair_distance_worst": float(distance.max()),
        "pair_cosine_mean": float(cosine.mean()),
        "pair_cosine_worst": float(cosine.min()),
        "pairs_merged": int(merged.sum()),
        "penalty_bytes": pulled.bytes_of_all_ranks,
    }


def due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


# --- evaluation -----------------------------------------------------------------------------------


class RankBlocks:
    """Every `world`-th block from `rank` on, filled up with a block that predicts nothing.

    All ranks then run the same number of forwards, which ZeRO needs.
    """

    def __init__(
        self,
        blocks: Blocks,
        count: int,
        rank: int,
        world: int,
        watch: Watchdog | None = None,
    ) -> None:
        self.blocks, self.count, self.rank, self.world = blocks, count, rank, world
        self.watch = watch

    def __len__(self) -> int:
        return math.ceil(self.count / self.world)

    def __getitem__(self, index: int) -> Batch:
        if self.watch is not None:
            self.watch.note("validation")
        mine = index * self.world + self.rank
        if mine < self.count:
            return self.blocks[mine]
        block = dict(self.blocks[0])
        block["labels"] = torch.full_like(block["labels"], IGNORED)
        return block


def validate(engine: Engine, blocks: Blocks, recipe: Recipe, watch: Watchdog) -> Row:
    """Validation loss (nats per token) and perplexity of the weights as they are."""
    count = min(len(blocks), recipe.evaluate.blocks or len(blocks))
    # Fewer blocks than ranks: each rank runs them all rather than none.
    rank, world = (engine.rank, engine.world) if count >= engine.world else (0, 1)
    mine = RankBlocks(blocks, count, rank, world, watch)
    measured = perplexity(
        engine.model,
        mine,  # type: ignore[arg-type]  # of Blocks it needs the length and the items
        recipe.evaluate.batch_size,
        progress=False,
    )
    total, tokens = engine.reduce_sum(
        torch.tensor(
            [measured.loss * measured.tokens, measured.tokens],
            dtype=torch.float64,
            device=engine.device,
        )
    ).tolist()
    loss = total / tokens
    return {"validation_loss": loss, "validation_perplexity": math.exp(loss)}
