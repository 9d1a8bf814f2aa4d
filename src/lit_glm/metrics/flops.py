"""How much a run has computed: FLOPs, rows and candidates, from the lengths of its examples alone.

Which examples a step trains on is a pure function of the step, and so is its work: nothing is counted while it trains,
and a run that was interrupted is counted as exactly as one that was not.

Multiply-adds of one forward pass, for n context rows and m candidate rows of a group, L layers, width D, vocabulary V:
linear layers 12 D^2 a row and layer (Q, K, V, output, two of the MLP), attention 2 D a pair of query and key and layer,
head D V a row that predicts. `shared_context` leaves out what the last layer's contexts need not compute: all but
K and V. A FLOP count is twice that; forward and backward together are three times the forward pass; recomputation under
activation checkpointing is not counted (Chowdhery et al. 2022, PaLM, appendix B, on model FLOPs utilisation).
"""

from dataclasses import dataclass
from typing import Any, Dict, List, Optional

import numpy as np

from lit_glm.config.schema import ModelConfig, TrainConfig
from lit_glm.data.memmap_dataset import MemmapDataset
from lit_glm.data.sampler import InfiniteDistributedBatchSampler

_FLAGPERF_FLOPS = 6 * 0.33e9 * 512
"""FlagPerf's count for a sample of GLM, whatever was computed (its glm-pytorch cases)."""
_MOST_STEPS = 1000


@dataclass
class WorkTotals:
    """What was computed, all ranks together."""

    flops: float = 0.0
    rows: float = 0.0
    """Tokens that went through the model."""
    candidates: float = 0.0
    """Candidates that were scored; padding slots do not count."""


def shared_context_flops(model: ModelConfig, context: Any, candidate: Any) -> Any:
    """FLOPs of training on groups.

    Args:
        model: its shape.
        context: [G] rows n of each group's context.
        candidate: [G] rows m of each group's candidates; each predicts one token.

    Returns:
        [G] forward and backward.
    """
    D, L = model.hidden_size, model.num_layers
    n, m = np.asarray(context, float), np.asarray(candidate, float)
    linear = 12.0 * D * D * ((L - 1) * (n + m) + m) + 2.0 * D * D * n
    attention = 2.0 * D * ((L - 1) * n * n + L * m * (n + m))
    return 6.0 * (linear + attention + m * D * model.vocab_size)


def published_flops(model: ModelConfig, sequences: Any, length: int) -> Any:
    """FLOPs of training on padded sequences, the head at every position.

    Args:
        model: its shape.
        sequences: how many.
        length: S.
    """
    D, L = float(model.hidden_size), model.num_layers
    row = L * (12.0 * D * D + 2.0 * D * length) + D * model.vocab_size
    return 6.0 * row * length * np.asarray(sequences, float)


class FlopCounter:
    """The work of the first k steps of a run, and how evenly the ranks share it."""

    def __init__(self, config: TrainConfig, split: MemmapDataset, sampler: InfiniteDistributedBatchSampler) -> None:
        """Get ready; costs a pass over the lengths.

        Args:
            config: the run's.
            split: training examples.
            sampler: the order.
        """
        self._config, self._split, self._sampler = config, split, sampler
        self._published = config.scoring.name == "published"
        self._candidates = np.diff(split.example_candidate_end).astype(float)
        self._epochs: List[Any] = []
        if not self._published:
            groups = split.example_group_end
            context = np.diff(split.group_context_end)
            first = np.concatenate([[0], np.cumsum(split.group_candidates)])
            candidate = np.diff(split.candidate_token_end[first])
            flops = np.concatenate([[0.0], np.cumsum(shared_context_flops(config.model, context, candidate))])
            self._flops = np.diff(flops[groups])

    def totals_until(self, step: int) -> WorkTotals:
        """All work of steps 1..step."""
        epoch, last = divmod(step, self._sampler.steps_per_epoch)
        while len(self._epochs) < epoch + bool(last):
            self._epochs.append(self._epoch(len(self._epochs)))
        total = sum((cumulative[-1] for cumulative in self._epochs[:epoch]), np.zeros(3))
        if last:
            total = total + self._epochs[epoch][last - 1]
        return WorkTotals(*(float(value) for value in total))

    def flops_per_step(self, steps: int) -> Any:
        """[steps] FLOPs of steps 1..steps, all ranks together."""
        self.totals_until(steps)
        each = [np.diff(cumulative[:, 0], prepend=0.0) for cumulative in self._epochs]
        return np.concatenate([*each, np.zeros(0)])[:steps]

    def _epoch(self, epoch: int) -> Any:
        """[steps of the epoch, 3] work up to each step, cumulative within the epoch."""
        order = self._sampler.epoch_order(epoch)
        starts = np.arange(0, len(order), self._config.global_batch)
        candidates = np.add.reduceat(self._candidates[order], starts)
        if self._published:
            first = epoch * self._sampler.steps_per_epoch + 1
            sequences = np.array([self._sequences(first + number) for number in range(len(starts))])
            length = self._config.data.max_seq_length
            columns = [published_flops(self._config.model, sequences, length), sequences * length, candidates]
        else:
            rows = np.add.reduceat(self._split.example_rows[order].astype(float), starts)
            columns = [np.add.reduceat(self._flops[order], starts), rows, candidates]
        return np.cumsum(np.stack(columns, axis=1), axis=0)

    def _sequences(self, step: int) -> float:
        """Sequences that the ranks compute in a step: each pads to the most candidates among its own examples."""
        return float(sum(len(share) * self._candidates[share].max() for share in self._sampler.rank_batches(step)))

    def flops_by_rank(self, step: int) -> Any:
        """[ranks] FLOPs of each rank in a step."""
        shares = self._sampler.rank_batches(step)
        if self._published:
            sequences = np.array([len(share) * self._candidates[share].max() for share in shares])
            return published_flops(self._config.model, sequences, self._config.data.max_seq_length)
        return np.array([self._flops[share].sum() for share in shares])

    def rank_imbalance(self, steps: int) -> Optional[float]:
        """By how much the rank with the most rows exceeds the mean of the ranks, mean over (at most 1,000) steps.

        Returns:
            0.05 where the others wait 5 % of a step for it; None for one rank.
        """
        ranks = self._config.topology.world_size
        if ranks == 1 or steps == 0:
            return None
        excess = []
        for step in np.unique(np.linspace(1, steps, min(steps, _MOST_STEPS)).astype(int)):
            shares = self._sampler.rank_batches(int(step))
            if self._published:
                rows = [len(share) * self._candidates[share].max() for share in shares]
            else:
                rows = [self._split.example_rows[share].sum() for share in shares]
            excess.append(max(rows) / (sum(rows) / ranks) - 1.0)
        return float(np.mean(excess))


def compute_mfu(
    config: TrainConfig, work: WorkTotals, seconds: Optional[float], p_core: Optional[float], peak: Optional[float]
) -> Dict[str, Optional[float]]:
    """Work against time and peak.

    Args:
        config: the run's: its cards and their peak.
        work: of all steps.
        seconds: pure_compute_time; None: unknown.
        p_core: samples a second.
        peak: TFLOP/s of a device in what really runs; None: unknown.

    Returns:
        mfu, mfu_flagperf (FlagPerf's formula; None without a known peak), tokens and candidate sequences a second.
    """
    rates: Dict[str, Optional[float]] = {"mfu": None, "mfu_flagperf": None}
    seconds = seconds or 0.0
    if peak and p_core and seconds > 0:
        all_cards = config.topology.world_size * peak * 1e12
        rates["mfu"] = work.flops / seconds / all_cards
        rates["mfu_flagperf"] = _FLAGPERF_FLOPS * p_core / all_cards
    measured = seconds > 0 and work.rows > 0
    rates["tokens_per_s"] = work.rows / seconds if measured else None
    rates["candidates_per_s"] = work.candidates / seconds if measured else None
    return rates


def peak_key(config: TrainConfig, has_tf32: bool) -> str:
    """Under which name the hardware file has the peak that counts.

    Args:
        config: the run's.
        has_tf32: whether the runtime can round fp32 products to TF32; a chip whose file has a peak for fp32 and none
            for TF32 has no such arithmetic either, whatever is asked for.
    """
    peaks = config.hardware.peak_tflops
    chip_has = peaks.get("tf32") is not None or peaks.get("fp32") is None
    rounds = config.precision.name == "fp32" and config.precision.tf32 and has_tf32 and chip_has
    return "tf32" if rounds else config.precision.name
