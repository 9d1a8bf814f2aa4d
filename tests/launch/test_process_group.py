"""What a rank checks before it joins the others."""

import pytest

from lit_glm.errors import InputError
from lit_glm.launch import process_group


def test_unregistered_collective_backend_is_rejected() -> None:
    process_group._check_backend("gloo", "cpu")
    process_group._check_backend("NCCL", "cuda")
    with pytest.raises(InputError, match="hardware=typo: its collective backend newccl is registered by neither torch"):
        process_group._check_backend("newccl", "typo")
