"""Receipts side by side: only of the same questions to the same original, and none that was edited."""

import json

import pytest

from undistilled.errors import BadArtefact, UsageError
from undistilled.prove.compare import draw, picture, rows
from undistilled.prove.receipt import seal


def write(folder, name, size, kl, sha="a", suite=None):
    receipt = seal(
        {
            "plan": {"scheme": name, "bytes": size, "bits_per_weight": 8.0},
            "original": {"digest": "d", "fingerprint": "f"},
            "text": {"sha256": sha},
            "tasks": {},
            "suite": suite,
            "top1_agreement": 0.9,
            "kl_nats": {"mean": kl, "se": 0.01},
            "speed": {"measured": {"decode_tokens_per_s": {"median": 10.0}}},
        }
    )
    file = folder / f"{name}.json"
    file.write_text(json.dumps(receipt))
    return file


def test_rows_come_smallest_first_and_make_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    suite = {"questions_sha256": "q", "mean": {"plan": 0.8, "original": 0.9}}
    files = [write(tmp_path, "big", 200, 0.1, suite=suite), write(tmp_path, "small", 100, 0.2, suite=suite)]
    found = rows(files)
    assert [(row["name"], row["bytes"], row["kl_nats"], row["suite"]) for row in found] == [
        ("small", 100, 0.2, 0.8),
        ("big", 200, 0.1, 0.8),
    ]
    draw(found, tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").read_text().count("<path") > 20


def test_names_stay_within_the_picture(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    found = rows([write(tmp_path, f"{size}-with-a-name-of-some-length", size * 10**6, 1 / size) for size in (100, 240)])
    figure = picture(found)
    figure.canvas.draw()
    [axes] = figure.axes
    edges = axes.get_window_extent()
    for name in axes.texts:
        assert edges.x0 <= name.get_window_extent().x0 and name.get_window_extent().x1 <= edges.x1
    pyplot.close(figure)


def test_receipts_of_other_questions_are_not_compared(tmp_path):
    with pytest.raises(UsageError, match="text"):
        rows([write(tmp_path, "one", 1, 0.1), write(tmp_path, "other", 2, 0.1, sha="b")])


def test_an_edited_receipt_is_none(tmp_path):
    file = write(tmp_path, "one", 1, 0.1)
    file.write_text(file.read_text().replace("0.1", "0.01"))
    with pytest.raises(BadArtefact, match="edited"):
        rows([file])
    (tmp_path / "text.json").write_text("hello")
    with pytest.raises(BadArtefact, match="no receipt"):
        rows([tmp_path / "text.json"])
    with pytest.raises(BadArtefact, match="No such file"):
        rows([tmp_path / "none.json"])
