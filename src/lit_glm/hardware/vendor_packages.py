"""Names of vendors' software that other packages need, without importing any of it."""

PACKAGES = ("xmlir", "xacc", "torch-xmlir", "nvidia-ml-py")
"""Distributions whose versions belong in a record of the environment."""
FRAMEWORKS = ("xmlir", "torch-xmlir")
"""Of these, what a report calls the training framework where it is installed."""
COMPILERS = ("xacc",)
"""Of these, what a report calls the training compiler."""
VISIBLE = ("CUDA_VISIBLE_DEVICES", "XPU_VISIBLE_DEVICES", "CUDART_DUMMY_REGISTER", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME")
"""Variables of runtimes that decide which cards a process sees, and how these talk to each other."""
