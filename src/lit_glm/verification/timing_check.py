"""Clock checks: synchronize blocks, time scales with work, and no matmul exceeds the stated peak.

Work is chained and its result is read, because a lazy runtime computes nothing that is never read.
"""

import time
from typing import Any, List, Optional, Tuple

import torch

from lit_glm.check_result import CheckResult
from lit_glm.config.schema import TrainConfig
from lit_glm.hardware.env import hardware_file
from lit_glm.hardware.runtimes.base import Runtime

_UNWAITED = 0.2
"""Share of the work's time that a read after synchronize may still take."""
_PROPORTIONAL = (1.5, 2.7)
_ABOVE_PEAK = 1.05
_FAR_BELOW = 0.1
_AT_LEAST_S = 0.1
_SIZES = tuple(2**power for power in range(8, 14))
_MATMUL_S = 0.02
"""Sizes of matmuls increase until one takes this long, so that a slow device finishes in time."""
_BYTES = (2**24, 2**28)
_COPY_S = 0.05


class ChainedMatmuls:
    """Chain of square matmuls of one size, each applied to the previous result."""

    def __init__(self, runtime: Runtime, dtype: torch.dtype, size: int) -> None:
        self._runtime, self.size = runtime, size
        device = runtime.device(0)
        # Each product of ones with a matrix of 1 / size is ones again, exactly, in every dtype.
        self._matrix = torch.ones((size, size), dtype=dtype, device=device)
        self._mean = torch.full((size, size), 1.0 / size, dtype=dtype, device=device)
        self._linear = runtime.model_ops().linear
        self.seconds(1)  # warm-up: whatever is created at first use

    def seconds(self, count: int) -> Tuple[float, float]:
        """Return the seconds until synchronize returns, and from then until the last result has been read."""
        self._runtime.synchronize()
        start = time.perf_counter()
        out: Any = self._matrix
        with torch.no_grad():
            for _ in range(count):
                out = self._linear(out, self._mean, None)
        self._runtime.after_step()
        self._runtime.synchronize()
        waited = time.perf_counter()
        float(out[-1, -1])
        return waited - start, time.perf_counter() - waited

    def calibrate(self) -> int:
        """Return the number of matmuls that takes long enough for the resolution of the clock."""
        count = 1
        while sum(self.seconds(count)) < _AT_LEAST_S and count < 2**14:
            count *= 2
        return count


def _largest_matmul(runtime: Runtime, dtype: torch.dtype) -> ChainedMatmuls:
    """Return the first matmul size that takes longer than `_MATMUL_S`, or the largest size."""
    matmuls = ChainedMatmuls(runtime, dtype, _SIZES[0])
    for size in _SIZES[1:]:
        if sum(matmuls.seconds(1)) > _MATMUL_S:
            break
        matmuls = ChainedMatmuls(runtime, dtype, size)
    return matmuls


def measure_matmul(runtime: Runtime, dtype: torch.dtype) -> Tuple[float, int]:
    """Measure TFLOP/s of the largest matmul; also return its size."""
    matmuls = _largest_matmul(runtime, dtype)
    count = matmuls.calibrate()
    seconds = min(sum(matmuls.seconds(count)) for _ in range(3))
    return 2.0 * matmuls.size**3 * count / seconds / 1e12, matmuls.size


def check_clock(runtime: Runtime) -> CheckResult:
    """Check that synchronize blocks, by timing a read after it, and that time scales with work."""
    matmuls = _largest_matmul(runtime, torch.float32)
    count = matmuls.calibrate()
    shares, ratios = [], []
    for _ in range(3):
        (once, read), (twice, read_twice) = matmuls.seconds(count), matmuls.seconds(2 * count)
        shares.append(max(read / max(once + read, 1e-9), read_twice / max(twice + read_twice, 1e-9)))
        ratios.append((twice + read_twice) / max(once + read, 1e-9))
    share, ratio = min(shares), sorted(ratios)[1]  # a single late read was delayed by other work
    if share > _UNWAITED:
        message = f"{share:.0%} of the time of a matmul chain passes after synchronize, until its result is read"
        advice = "synchronize returns before the work is done: no timing of this runtime is valid"
        return CheckResult("clock", "fail", message, advice, share, _UNWAITED)
    if not _PROPORTIONAL[0] <= ratio <= _PROPORTIONAL[1]:
        message = f"time does not scale with work (2x work: {ratio:.2f}x time)"
        advice = "repeat on an idle machine; if it persists, synchronize or the clock is not reliable"
        return CheckResult("clock", "warn", message, advice, ratio, 2.0)
    message = f"synchronize blocks; time scales with work (2x work: {ratio:.2f}x time)"
    return CheckResult("clock", "ok", message, value=share, bound=_UNWAITED)


def check_speed(
    config: TrainConfig, runtime: Runtime, dtype: torch.dtype, peak: Optional[float], which: str
) -> List[CheckResult]:
    """Compare the largest matmul with the peak in the hardware file, in TFLOP/s."""
    name = f"speed {config.precision.name}"
    fastest, edge = measure_matmul(runtime, dtype)
    key, size = f"hardware.peak_tflops.{which}", f"{edge} x {edge}"
    if peak is None:
        message = f"{fastest:.3g} TFLOP/s ({size}); {key} is unknown: no mfu"
        return [CheckResult(name, "ok", message, value=fastest)]
    share = fastest / peak
    message = f"{fastest:.3g} TFLOP/s ({size}), {share:.0%} of {key}={peak:g}"
    if share > _ABOVE_PEAK:
        advice = f"the peak in {hardware_file(config.hardware.name)} is not this device's, or the clock is wrong"
        return [CheckResult(name, "fail", message, advice, fastest, peak)]
    if share < _FAR_BELOW:
        advice = "is the device shared, throttled, or the precision emulated?"
        return [CheckResult(name, "warn", message, advice, fastest, peak)]
    return [CheckResult(name, "ok", message, value=fastest, bound=peak)]


def check_bandwidth(runtime: Runtime) -> List[CheckResult]:
    """Measure the bandwidth of device memory and of copies from host to device, in GB/s."""
    device = runtime.device(0)

    def seconds(size: int, from_host: bool, count: int = 1) -> float:
        """Return the seconds of one of `count` operations on `size` bytes, until the last result has been read."""
        host = torch.ones(size // 4)
        values, spare = host.to(device), torch.empty_like(host, device=device)
        times = []
        for _ in range(4):  # the first one is a warm-up
            runtime.synchronize()
            start = time.perf_counter()
            for _ in range(count):
                if from_host:
                    spare.copy_(host)
                else:
                    torch.add(values, 1.0, out=spare)
                values, spare = spare, values
            runtime.after_step()
            runtime.synchronize()
            float(values[-1])
            times.append((time.perf_counter() - start) / count)
        return min(times[1:])

    size = _BYTES[1] if seconds(_BYTES[0], False) * _BYTES[1] / _BYTES[0] < 4 * _COPY_S else _BYTES[0]
    count = max(1, min(16, int(_COPY_S / seconds(size, False))))  # so that a launch and a read hardly count
    rate = 2.0 * size / seconds(size, False, count) / 1e9
    checks = [CheckResult("memory bandwidth", "ok", f"{_format_rate(rate)}, read and written", value=rate)]
    if device.type != "cpu":
        rate = size / seconds(size, True) / 1e9
        checks.append(CheckResult("copy to the device", "ok", f"{_format_rate(rate)} from pageable memory", value=rate))
    return checks


def _format_rate(gbytes_s: float) -> str:
    return f"{gbytes_s:,.0f} GB/s" if gbytes_s >= 100 else f"{gbytes_s:.3g} GB/s"
