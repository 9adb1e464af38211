"""Training on tiny models: packing, the bank to train, learning, balance, resuming, export."""

from dataclasses import replace

import pytest
import torch

from logits import our_logits
from tiny import DEEPSEEK, load, write_checkpoint
from undistilled.checkpoint.resolve import find
from undistilled.model.batch import Packed
from undistilled.model.layers import MoeLayer
from undistilled.model.spec import spec_from_config
from undistilled.ops.registry import force_reference
from undistilled.prove import suite
from undistilled.prove.answers import prompts
from undistilled.tune import memory
from undistilled.tune.examples import LONGEST, Document, encode
from undistilled.tune.export import export, read
from undistilled.tune.loop import Recipe, Trainer
from undistilled.tune.packing import IGNORED, pack
from undistilled.tune.trainable import TrainBank

CONFIG = DEEPSEEK | {"num_nextn_predict_layers": 1, "torch_dtype": "bfloat16", "num_hidden_layers": 2}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _differentiable():
    with force_reference():
        yield


def documents(count: int, seed: int = 0) -> list[Document]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 300, (count, 24), generator=generator)
    return [Document(row.tolist(), 4, "random") for row in ids]


def trainer(**options) -> Trainer:
    return Trainer(spec_from_config(CONFIG), Recipe(1e9, tokens=256, rate=3e-3, warmup=5), CPU, **options)


def test_packing_knows_where_documents_end_and_what_is_given():
    sample = pack([Document([5, 6, 7, 8], 2, "a"), Document([9, 10, 11], 1, "b"), Document([1, 2, 3, 4], 1, "c")], 9)
    assert sample.tokens_T.tolist() == [5, 6, 7, 8, 9, 10, 11, 1, 2]
    assert sample.positions_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]
    assert sample.targets_T.tolist() == [IGNORED, 7, 8, IGNORED, 10, 11, IGNORED, 2, 3]
    assert sample.second_T.tolist() == [IGNORED, 8, IGNORED, IGNORED, 11, IGNORED, IGNORED, 3, 4]


def test_bounds_are_of_one_number_and_never_longer_than_promised():
    for count in (1, 9):
        sample = pack(documents(count), 4096)
        lengths = sample.bounds_S.diff()
        assert len(sample.bounds_S) == 4096 // 24 + 8
        assert int(sample.bounds_S[-1]) == 4096 and lengths.min() >= 0 and lengths.max() <= LONGEST


def test_packed_documents_see_themselves_alone(tmp_path):
    decoder, plan = load(write_checkpoint(tmp_path / "m", CONFIG), kv="float32", dtype="float32")
    pair = documents(2)
    sample = pack(pair, 48)
    with torch.no_grad():
        packed = decoder.logits(decoder(sample.packed(), [()] * 2))
        for at, document in enumerate(pair):
            alone = our_logits(decoder, plan, document.ids)
            assert torch.allclose(packed[24 * at : 24 * at + 24], alone, rtol=1e-4, atol=1e-4)


def test_the_bank_to_train_computes_what_the_served_one_does_and_counts(tmp_path):
    decoder, _ = load(write_checkpoint(tmp_path / "m", CONFIG), dtype="float32")
    moe = next(m for m in decoder.modules() if isinstance(m, MoeLayer))
    served, trained = moe.banks[0], TrainBank(moe.banks[0])
    x, weights = torch.randn(40, 256), torch.rand(40, 4)
    ids = torch.rand(40, 16).topk(4).indices
    expected, found = served.submit(x, ids, weights), trained.submit(x, ids, weights)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert trained.counts_E.tolist() == torch.bincount(ids.flatten(), minlength=16).tolist()


def test_a_student_learns_both_tokens_by_heart():
    learner, sample = trainer(), pack(documents(8), 192)
    losses = [[float(x) for x in learner.one(sample)[1:3]] for _ in range(40)]
    assert losses[-1][0] < 0.2 * losses[0][0] and losses[-1][1] < 0.3 * losses[0][1]


@pytest.mark.parametrize("way", ["recompute"])  # "offload" pins memory: benchmarks/train_memory.py, on a GPU
def test_activations_handled_otherwise_give_the_same_steps(way):
    sample = pack(documents(4), 96)
    kept, other = trainer(), trainer(activations=way)
    for _ in range(3):
        assert float(kept.one(sample)[1].detach()) == pytest.approx(float(other.one(sample)[1].detach()), rel=1e-5)
    assert set(memory.WAYS) == {"keep", "recompute", "offload"}


def test_balance_moves_choices_toward_even_loads():
    student = trainer().student.train()
    moe = student.moe_layers[0]
    moe.bias.values[0] = 5.0  # every token now wants expert 0
    student.hidden(pack(documents(4), 96).packed())
    before = moe.bias.values.clone()
    shares = student.balance(0.5, lambda counts: None)
    assert shares[0].sum() == pytest.approx(1, abs=1e-5) and shares[0, 0] == pytest.approx(0.25)
    rare = shares[0] < 1 / 16
    assert rare.any() and moe.bias.values[0] == before[0] - 0.5
    assert (moe.bias.values[rare] == before[rare] + 0.5).all()
    assert not moe.banks[0].counts_E.any()


def test_a_resumed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    samples = [pack(documents(4, seed), 96) for seed in range(4)]
    whole, first, second = trainer(), trainer(), trainer()
    expected = [float(whole.one(s)[1]) for s in samples]
    assert not second.resume(tmp_path)
    for s in samples[:2]:
        first.one(s)
    first.save(tmp_path)
    assert second.resume(tmp_path) and second.step == 2
    assert [float(second.one(s)[1]) for s in samples[2:]] == pytest.approx(expected[2:], rel=1e-6)


def test_the_rate_rises_stays_and_falls_to_nothing():
    recipe = Recipe(100, rate=1.0, warmup=10)
    assert recipe.rate_at(0, 0) == pytest.approx(0.1) and recipe.rate_at(50, 49) == 1
    assert recipe.rate_at(50, 75) == pytest.approx(0.5) and recipe.rate_at(50, 101) == 0


def test_exports_load_in_both_formats_and_fp8_is_the_bf16_one_compressed(tmp_path):
    student = trainer().student
    export(student.decoder.spec, CONFIG, student.named, tmp_path / "bf16", fp8=False)
    source = find(str(tmp_path / "bf16"))
    export(source.spec, CONFIG, read(source.source(), source.spec), tmp_path / "fp8", fp8=True, shard=1 << 20)
    export(student.decoder.spec, CONFIG, student.named, tmp_path / "direct", fp8=True, shard=1 << 20)
    files = sorted(p.name for p in (tmp_path / "fp8").glob("*.safetensors"))
    assert len(files) > 1
    for name in files:
        assert (tmp_path / "fp8" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()
    ids = documents(1)[0].ids
    sample = pack([Document(ids, 1, "x")], 24)
    with torch.no_grad():
        expected = student.decoder.logits(student.hidden(sample.packed()))
        for name, tolerance in (("bf16", 0.02), ("fp8", 0.4)):  # random routers flip
            decoder, plan = load(tmp_path / name, kv="float32", mtp=True, dtype="float32")
            found = our_logits(decoder, plan, ids)
            assert (found - expected).norm() / expected.norm() < tolerance, name


def test_a_packed_batch_of_another_length_is_another_batch():
    """`Packed` is what the model looks at: moving a bound changes what a token sees."""
    student, sample = trainer().student, pack(documents(2), 48)
    with torch.no_grad():
        apart = student.hidden(sample.packed())
        bounds = torch.tensor([0, 48], dtype=torch.int32)
        together = student.hidden(Packed(sample.tokens_T, sample.positions_T, bounds, LONGEST))
    assert torch.allclose(apart[:24], together[:24], atol=1e-4) and not torch.allclose(apart[24:], together[24:])
    assert replace(sample, bounds_S=bounds).packed().longest == LONGEST


@pytest.mark.parametrize("thinking", [True, False])
def test_a_training_prompt_is_what_the_chat_template_writes(thinking):
    model = find("r1-nano")
    for task in ("gcd", "caesar_cipher", "number_sorting"):
        (item,) = suite.test_items(task, 1)
        document = encode(item, model.tokenizer(), thinking)
        (prompt,) = prompts(model.tokenizer(), [item], model.name, thinking=thinking)
        assert document.ids[: document.given] == prompt.ids
        assert document.ids[-1] == model.tokenizer().eos_ids[0] and document.given < len(document.ids)
