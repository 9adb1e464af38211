import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import toy

from undistilled.prove.receipt import prove


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return toy.checkpoint(tmp_path_factory.mktemp("models") / "toy-llama")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "austen.txt"
    file.write_text(toy.TEXT)
    return file


@pytest.fixture(scope="session")
def receipt(folder, text, tmp_path_factory):
    tasks = [toy.task_file(tmp_path_factory.mktemp("tasks"))]
    return prove(
        str(folder), scheme="int4", text=text, tasks=tasks, tokens=300, context=128, window=64, command=toy.bench
    )
