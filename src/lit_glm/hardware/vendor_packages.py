"""Names of vendors' software that other packages need, without importing any of it."""

PACKAGES = ("xmlir", "xacc", "torch-xmlir", "nvidia-ml-py")
"""Distributions whose versions belong in a record of the environment."""
FRAMEWORKS = ("xmlir", "torch-xmlir")
"""Of these, what a report calls the training framework where it is installed."""
COMPILERS = ("xacc",)
"""Of these, what a report calls the training compiler."""
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "XPU_VISIBLE_DEVICES", "CUDART_DUMMY_REGISTER", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME",
    "NVIDIA_TF32_OVERRIDE", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "TORCH_CUDNN_SDPA_DEPRIORITIZED",
    "CUDA_LAUNCH_BLOCKING", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)  # fmt: skip
"""Variables of runtimes that decide which devices a process sees, how these communicate, and what they compute in."""
