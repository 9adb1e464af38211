"""Builds for other processors have the bits of the one that is loaded here: compiled anew, run where they can be. One
ends where memory is not its own or arithmetic is undefined."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from undistilled.ops.cpu import builds, native

HERE = Path(__file__).parent / "drive.cpp"
FLAGS = ["-std=c++17", "-O1", "-pthread", "-ffp-contract=off", "-fno-exceptions", "-fno-rtti", "-Wno-psabi"]
OTHERS = {  # compiler, what it is told, what runs the result
    "generic": ("g++", ["-march=x86-64-v3", "-mno-f16c"], []),
    "sanitized": ("g++", ["-march=x86-64-v3", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"], []),
    **{b.name: ("aarch64-linux-gnu-g++", [*b.flags, "-static"], ["qemu-aarch64"]) for b in builds.ARM},
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(native.library() is None, reason=native.why_missing()),
    pytest.mark.skipif(builds.builds() is not builds.X86, reason="compares with a build for x86"),
    pytest.mark.skipif(not shutil.which("g++"), reason="needs g++"),
]


def linked(folder, compiler, flags, *what):
    """The program drive.cpp, with these sources or libraries."""
    include = ["-I", str(builds.FOLDER), '-DSOURCES="these"']

    def one(source):
        made = folder / f"{source.stem}.o"
        subprocess.run([compiler, *FLAGS, *flags, *include, "-c", str(source), "-o", str(made)], check=True)
        return str(made)

    sources, rest = [w for w in (HERE, *what) if w.suffix == ".cpp"], [str(w) for w in what if w.suffix != ".cpp"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(one, sources))
    program = folder / "drive"
    subprocess.run([compiler, *FLAGS, *flags, *objects, *rest, "-o", str(program)], check=True)
    return str(program)


def printed(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=280).stdout.splitlines()


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """What the loaded build prints."""
    return printed(linked(tmp_path_factory.mktemp("ours"), "g++", [], Path(native.library()._name)))


@pytest.mark.parametrize("name", OTHERS)
def test_another_build_has_the_same_bits(name, ours, tmp_path):
    compiler, flags, runner = OTHERS[name]
    if not all(map(shutil.which, (compiler, *runner))):
        pytest.skip(f"needs {compiler} {' '.join(runner)}")
    theirs = printed(*runner, linked(tmp_path, compiler, flags, *sorted(builds.FOLDER.glob("*.cpp"))))
    assert len(ours) > 5000 and [b for a, b in zip(ours, theirs, strict=True) if a != b] == []
