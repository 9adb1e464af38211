"""Which build of the kernels a processor gets."""

import pytest

from undistilled.ops.cpu import builds, loader

BF16, AVX512, AVX2 = builds.X86
ALL = " ".join(BF16.needs)


@pytest.fixture
def built(tmp_path, monkeypatch):
    """Pretends that these builds lie in a folder, on an x86."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setenv("UNDISTILLED_KERNELS", str(tmp_path))

    def make(*some):
        for build in some:
            (tmp_path / build.file).touch()

    return make


def test_the_best_build_that_is_there_and_that_the_processor_has(built):
    built(AVX2, AVX512, BF16)
    assert builds.choose({"flags": f"fpu {ALL} amx"}) == BF16
    assert builds.choose({"flags": ALL.replace("avx512_bf16", "")}) == AVX512
    assert builds.choose({"flags": ALL.replace("avx512_vnni", "")}) == AVX2
    assert builds.choose({"flags": " ".join(AVX2.needs)}) == AVX2
    assert builds.choose({}) == AVX2


def test_a_build_that_was_not_made_is_left_out(built):
    built(AVX2, AVX512)
    assert builds.choose({"flags": ALL}) == AVX512


def test_what_is_lacking_is_named(built, tmp_path):
    assert str(tmp_path) in builds.choose({"flags": ALL})
    built(AVX2, AVX512)
    why = builds.choose({"flags": "fpu avx2 f16c"})
    assert AVX2.file in why and "fma" in why and "avx512" not in why and "f16c" not in why
    (tmp_path / AVX2.file).unlink()
    assert "avx512f" in builds.choose({"flags": " ".join(AVX2.needs)})


def test_a_build_is_asked_for_by_name(built, monkeypatch):
    monkeypatch.setattr(builds, "FOLDER", builds.asked()[0])
    built(AVX2, AVX512, BF16)
    monkeypatch.setenv("UNDISTILLED_KERNELS", "avx2")
    assert builds.choose({"flags": ALL}) == AVX2
    monkeypatch.setenv("UNDISTILLED_KERNELS", "avx512_bf16")
    assert BF16.file in builds.choose({"flags": " ".join(AVX2.needs)})


def test_libraries_of_earlier_versions_are_not_taken(built, tmp_path):
    (tmp_path / "_kernels.cpython-311-x86_64-linux-gnu.so").touch()
    assert isinstance(builds.choose({"flags": ALL}), str)


def test_arm_has_a_build_with_products_of_bytes_and_one_without(built, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    dotprod, neon = builds.ARM
    built(dotprod, neon, AVX2)
    assert builds.choose({"features": "fp asimd"}) == neon and not neon.integers
    assert builds.choose({"features": "fp asimd asimddp"}) == dotprod and dotprod.integers
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert builds.choose({}) == dotprod


def test_another_architecture_has_one_build(built, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    (native,) = builds.OTHERS
    built(native, AVX2)
    assert builds.choose({"isa": "rv64gcv"}) == native


def test_a_library_of_other_sources_is_not_called(tmp_path):
    """The Python side would hand it structures that it reads otherwise."""
    (tmp_path / "one.cpp").write_text("int x;")
    before = builds.sources(tmp_path)
    (tmp_path / "one.cpp").write_text("int y;")
    assert before and builds.sources(tmp_path) != before and builds.sources(tmp_path / "none") == ""
    if not isinstance(loader._chosen(), str):
        assert loader.library() is not None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loader, "sources", lambda: "others")
            assert "other sources" in loader._load.__wrapped__()[1]
