"""The Dockerfiles, as far as they can be read without Docker: what they copy exists, what they pin is tested."""

import re
from pathlib import Path
from typing import List

import pytest

ROOT = Path(__file__).parent.parent


def instructions(name: str) -> List[List[str]]:
    lines = (ROOT / name).read_text().replace("\\\n", " ").splitlines()
    return [line.split() for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.seed"])
def test_dockerfile_copy_sources_exist_and_are_not_ignored(name: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = [source for words in instructions(name) if words[0] == "COPY" for source in words[1:-1]]
    assert {"conf", "src", "pyproject.toml"} <= set(copied)
    for source in copied:
        if not source.endswith("*"):  # the vendor's wheels, if there are any
            assert (ROOT / source).exists(), source
        assert not set(ignored) & {source, source.split("/")[0]}


@pytest.mark.parametrize(
    ("name", "constraints", "python", "torch"),
    [("Dockerfile", "current.txt", "python:3.11", "2.13.0"), ("Dockerfile.seed", "seed.txt", "python3.8", "1.12.1")],
)
def test_dockerfile_uses_the_tested_versions(name: str, constraints: str, python: str, torch: str) -> None:
    text = (ROOT / name).read_text()
    assert f"constraints/{constraints}" in text
    assert python in text
    assert re.search(rf"^torch=={re.escape(torch)}$", (ROOT / "constraints" / constraints).read_text(), re.MULTILINE)
    assert f"torch=={torch}" in text or "constraints/current.txt" in text.split("RUN pip install", 1)[1]
    assert instructions(name)[-1] == ["ENTRYPOINT", '["lit-glm"]']
