"""Work of a run: FLOPs, rows and candidates, computed from the lengths of its examples alone.

The examples of a step are a pure function of the step number, and so is its work: nothing is counted during training,
and the work of an interrupted run is exact too.

Multiply-adds of one forward pass, for n context rows and m candidate rows of a group, L layers, width D, vocabulary V:
linear layers 12 D^2 per row and layer (Q, K, V, output, two of the MLP), attention 2 D per query-key pair and layer,
head D V per row that predicts. `shared_context` skips what the last layer's contexts need not compute: all but K and V.
The FLOP count is twice that; forward and backward together are three times the forward pass; recomputation under
activation checkpointing is not counted (Chowdhery et al. 2022, PaLM, appendix B, on model FLOPs utilisation).
"""

from dataclasses import dataclass
from typing import Any, Dict, List, Optional

import numpy as np

from lit_glm.config.schema import ModelConfig, TrainConfig
from lit_glm.data.memmap_dataset import MemmapDataset
from lit_glm.data.sampler import InfiniteDistributedBatchSampler

_FLAGPERF_FLOPS = 6 * 0.33e9 * 512
"""FLOPs per sample of GLM in FlagPerf's formula, whatever was computed (its glm-pytorch cases)."""
_MAX_STEPS = 1000


@dataclass
class WorkTotals:
    """Work of a run, summed over all ranks."""

    flops: float = 0.0
    rows: float = 0.0
    """Tokens processed by the model."""
    candidates: float = 0.0
    """Scored candidates, without padding slots."""


def shared_context_flops(model: ModelConfig, context: Any, candidate: Any) -> Any:
    """Compute the FLOPs of training on groups.

    Args:
        model: model shape.
        context: [G] number n of context rows per group.
        candidate: [G] number m of candidate rows per group; each predicts one token.

    Returns:
        [G] FLOPs of forward and backward pass.
    """
    D, L = model.hidden_size, model.num_layers
    n, m = np.asarray(context, float), np.asarray(candidate, float)
    linear = 12.0 * D * D * ((L - 1) * (n + m) + m) + 2.0 * D * D * n
    attention = 2.0 * D * ((L - 1) * n * n + L * m * (n + m))
    return 6.0 * (linear + attention + m * D * model.vocab_size)


def published_flops(model: ModelConfig, sequences: Any, length: int) -> Any:
    """Compute the FLOPs of training on padded sequences, with the head at every position.

    Args:
        model: model shape.
        sequences: number of sequences.
        length: sequence length S.
    """
    D, L = float(model.hidden_size), model.num_layers
    row = L * (12.0 * D * D + 2.0 * D * length) + D * model.vocab_size
    return 6.0 * row * length * np.asarray(sequences, float)


class FlopCounter:
    """Counter of the work of a run's first k steps, and of its balance between ranks."""

    def __init__(self, config: TrainConfig, split: MemmapDataset, sampler: InfiniteDistributedBatchSampler) -> None:
        """Compute the work per example; takes one pass over the lengths."""
        self._config, self._sampler = config, sampler
        self._candidates = np.diff(split.example_candidate_end).astype(float)
        self._epochs: List[Any] = []
        self._examples: Any = None
        """[N, 3] FLOPs, rows and candidates of each example; None with `published`, where they depend on the batch."""
        if config.scoring.name != "published":
            context = np.diff(split.group_context_end)
            first = np.concatenate([[0], np.cumsum(split.group_candidates)])
            candidate = np.diff(split.candidate_token_end[first])
            flops = np.concatenate([[0.0], np.cumsum(shared_context_flops(config.model, context, candidate))])
            rows = split.example_rows.astype(float)
            self._examples = np.stack([np.diff(flops[split.example_group_end]), rows, self._candidates], axis=1)

    def _work_by_rank(self, step: int) -> Any:
        """Return FLOPs, rows and candidates of each rank in a step, [ranks, 3]."""
        shares = self._sampler.rank_batches(step)
        if self._examples is not None:
            return np.stack([self._examples[share].sum(axis=0) for share in shares])
        # Each rank pads to the most candidates among its own examples.
        sequences = np.array([len(share) * self._candidates[share].max() for share in shares])
        length = self._config.data.max_seq_length
        flops = published_flops(self._config.model, sequences, length)
        return np.stack([flops, sequences * length, [self._candidates[share].sum() for share in shares]], axis=1)

    def totals_until(self, step: int) -> WorkTotals:
        """Return the work of steps 1..step."""
        epoch, last = divmod(step, self._sampler.steps_per_epoch)
        while len(self._epochs) < epoch + bool(last):
            self._epochs.append(self._epoch(len(self._epochs)))
        total = sum((cumulative[-1] for cumulative in self._epochs[:epoch]), np.zeros(3))
        return WorkTotals(*map(float, total + self._epochs[epoch][last - 1] if last else total))

    def flops_per_step(self, steps: int) -> Any:
        """Return the FLOPs of each of steps 1..steps, summed over all ranks, [steps]."""
        self.totals_until(steps)
        per_epoch = [np.diff(cumulative[:, 0], prepend=0.0) for cumulative in self._epochs]
        return np.concatenate([*per_epoch, np.zeros(0)])[:steps]

    def _epoch(self, epoch: int) -> Any:
        """Return the work up to each step of an epoch, cumulative within the epoch, [steps of the epoch, 3]."""
        count = self._sampler.steps_per_epoch
        if self._examples is None:
            work = np.stack([self._work_by_rank(epoch * count + step).sum(axis=0) for step in range(1, count + 1)])
        else:
            order = self._sampler.epoch_order(epoch)
            work = np.add.reduceat(self._examples[order], np.arange(0, len(order), self._config.global_batch), axis=0)
        return np.cumsum(work, axis=0)

    def flops_by_rank(self, step: int) -> Any:
        """Return the FLOPs of each rank in a step, [ranks]."""
        return self._work_by_rank(step)[:, 0]

    def rank_imbalance(self, steps: int) -> Optional[float]:
        """Compute the load imbalance (max - mean) / mean of rows per rank, averaged over at most 1,000 steps.

        Returns:
            Imbalance, such as 0.05 if the other ranks wait 5 % of a step; None for one rank or without steps.
        """
        if self._config.topology.world_size == 1 or steps == 0:
            return None
        sampled = np.unique(np.linspace(1, steps, min(steps, _MAX_STEPS)).astype(int))
        rows = np.stack([self._work_by_rank(int(step))[:, 1] for step in sampled])
        return float((rows.max(axis=1) / rows.mean(axis=1)).mean() - 1.0)


def compute_mfu(
    config: TrainConfig, work: WorkTotals, seconds: Optional[float], p_core: Optional[float], peak: Optional[float]
) -> Dict[str, Optional[float]]:
    """Compute MFU and throughput of a run.

    Args:
        config: run configuration.
        work: work of all steps.
        seconds: pure_compute_time; None: unknown.
        p_core: samples per second.
        peak: TFLOP/s of a device in the arithmetic that is really used; None: unknown.

    Returns:
        mfu, mfu_flagperf (FlagPerf's formula; None without a known peak), tokens and candidates per second.
    """
    seconds = seconds or 0.0
    available = config.topology.world_size * peak * 1e12 if peak and p_core and seconds > 0 else None
    has_work = seconds > 0 and work.rows > 0
    return {
        "mfu": work.flops / seconds / available if available else None,
        "mfu_flagperf": _FLAGPERF_FLOPS * (p_core or 0.0) / available if available else None,
        "tokens_per_s": work.rows / seconds if has_work else None,
        "candidates_per_s": work.candidates / seconds if has_work else None,
    }


def peak_key(config: TrainConfig, has_tf32: bool) -> str:
    """Return the key of the applicable peak in the hardware file.

    Args:
        config: run configuration.
        has_tf32: whether the runtime can round fp32 products to TF32; a device whose file has a peak for fp32 and none
            for TF32 is assumed to lack TF32, whatever the configuration requests.
    """
    peaks = config.hardware.peak_tflops
    device_has_tf32 = peaks.get("tf32") is not None or peaks.get("fp32") is None
    rounds = config.precision.name == "fp32" and config.precision.tf32 and has_tf32 and device_has_tf32
    return "tf32" if rounds else config.precision.name
