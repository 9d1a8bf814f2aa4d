"""Whether time is told truthfully: synchronize waits, twice the work takes twice as long, no product beats the peak."""

import time
from typing import Any, Callable, List, Optional, Tuple

import torch

from lit_glm.check_result import CheckResult
from lit_glm.config.schema import TrainConfig
from lit_glm.hardware.runtimes.base import Runtime

_UNWAITED = 0.2
"""Share of the work's time that a read after synchronize may still take."""
_PROPORTIONAL = (1.5, 2.7)
_ABOVE_PEAK = 1.05
_FAR_BELOW = 0.1
_AT_LEAST_S = 0.1
_COPIED = 2**28  # bytes


class TimedMatmuls:
    """Square products of one size; some fill the time that is asked for."""

    def __init__(self, runtime: Runtime, dtype: torch.dtype, size: int) -> None:
        self._runtime, self.size = runtime, size
        device = runtime.device(0)
        self._a = torch.full((size, size), 0.5, dtype=dtype, device=device)
        self._out: Any = None
        linear = runtime.model_ops().linear
        self._product: Callable[[], Any] = lambda: linear(self._a, self._a, None)
        self.seconds(1)  # whatever is made at first use

    def seconds(self, count: int) -> Tuple[float, float]:
        """Until synchronize comes back, and after that until a value has been read."""
        self._runtime.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            for _ in range(count):
                self._out = self._product()
        self._runtime.synchronize()
        waited = time.perf_counter()
        float(self._out[-1, -1])
        return waited - start, time.perf_counter() - waited

    def calibrate(self) -> int:
        """How many take long enough to be told from the clock's own steps."""
        count = 1
        while sum(self.seconds(count)) < _AT_LEAST_S and count < 2**14:
            count *= 2
        return count


def _matmul_size(runtime: Runtime) -> int:
    return 1024 if runtime.device(0).type == "cpu" else 4096


def check_clock(runtime: Runtime) -> CheckResult:
    """Read a value after synchronize: what that takes has not been waited for."""
    products = TimedMatmuls(runtime, torch.float32, _matmul_size(runtime))
    count = products.calibrate()
    shares, ratios = [], []
    for _ in range(3):
        (once, read), (twice, read_twice) = products.seconds(count), products.seconds(2 * count)
        shares.append(read / max(once + read, 1e-9))
        ratios.append((twice + read_twice) / max(once + read, 1e-9))
    share, ratio = min(shares), sorted(ratios)[1]  # a read that is late once was held up by other work
    if share > _UNWAITED:
        advice = "synchronize comes back before the work is done: no figure of this runtime is to be trusted"
        return CheckResult("clock", "fail", "a value is not there yet after synchronize", advice, share, _UNWAITED)
    if not _PROPORTIONAL[0] <= ratio <= _PROPORTIONAL[1]:
        said = f"twice the work takes {ratio:.2f} times as long"
        advice = "repeat on an idle machine; if it stays, synchronize or the clock is not what it seems"
        return CheckResult("clock", "warn", said, advice, ratio, 2.0)
    said = f"synchronize waits; twice the work takes {ratio:.2f} times as long"
    return CheckResult("clock", "ok", said, value=share, bound=_UNWAITED)


def check_speed(
    config: TrainConfig, runtime: Runtime, dtype: torch.dtype, peak: Optional[float], which: str
) -> List[CheckResult]:
    """The largest product against the file's peak, in TFLOP/s.

    Args:
        config: names chip and precision.
        runtime: of the device.
        dtype: that products are computed in.
        peak: of the file; None: unknown.
        which: its key there.
    """
    name = f"speed {config.precision.name}"
    sizes = (1024, 2048) if runtime.device(0).type == "cpu" else (4096, 8192)
    fastest = 0.0
    for size in sizes:
        products = TimedMatmuls(runtime, dtype, size)
        count = products.calibrate()
        seconds = min(sum(products.seconds(count)) for _ in range(3))
        fastest = max(fastest, 2.0 * size**3 * count / seconds / 1e12)
    key = f"hardware.peak_tflops.{which}"
    if peak is None:
        return [CheckResult(name, "ok", f"{fastest:.3g} TFLOP/s; {key} is unknown, so there is no mfu", value=fastest)]
    share = fastest / peak
    said = f"{fastest:.3g} TFLOP/s, {share:.0%} of {key}={peak:g}"
    if share > _ABOVE_PEAK:
        file = f"conf/hardware/{config.hardware.name}.yaml"
        advice = f"the peak in {file} is not this device's, or the clock is wrong"
        return [CheckResult(name, "fail", said, advice, fastest, peak)]
    if share < _FAR_BELOW:
        advice = "is the device shared, throttled, or the precision emulated?"
        return [CheckResult(name, "warn", said, advice, fastest, peak)]
    return [CheckResult(name, "ok", said, value=fastest, bound=peak)]


def check_bandwidth(runtime: Runtime) -> List[CheckResult]:
    """Memory of the device, and copies between it and the host; GB/s."""
    device = runtime.device(0)
    source = torch.ones(_COPIED // 4, device=device)
    target, host = torch.empty_like(source), torch.ones(_COPIED // 4)

    def rate(copy: Callable[[], Any], bytes_moved: float) -> float:
        copy()
        times = []
        for _ in range(3):
            runtime.synchronize()
            start = time.perf_counter()
            copy()
            runtime.synchronize()
            times.append(time.perf_counter() - start)
        return bytes_moved / min(times) / 1e9

    own = rate(lambda: target.copy_(source), 2.0 * _COPIED)
    checks = [CheckResult("memory bandwidth", "ok", f"{own:.3g} GB/s, read and written", value=own)]
    if device.type != "cpu":
        there = rate(lambda: target.copy_(host), _COPIED)
        checks.append(CheckResult("copy to the device", "ok", f"{there:.3g} GB/s from pageable memory", value=there))
    return checks
