"""Experts in memory: the right one answers, nothing else moves, and there is never more than the limit."""

import shutil
import threading

import pytest
import torch
from expert_kit import EXPERTS, adapter, alone, base, library
from peft import PeftModel

from retain.errors import ConfigError, ModelError
from retain.experts import mixed as module
from retain.experts.library import ExpertLibrary
from retain.experts.pool import AdapterPool, open_pool

IDS = torch.arange(48).reshape(4, 12)


@pytest.fixture(scope="module")
def books(tiny_folder, tmp_path_factory):
    return library(tiny_folder, tmp_path_factory.mktemp("pool") / "experts")


@pytest.fixture(scope="module")
def truth(books, tiny_folder):
    """Logits of each expert in a model of its own, and of the base under None."""
    with torch.no_grad():
        said = {name: alone(tiny_folder, books.path(name))(IDS).logits for name in EXPERTS}
        return said | {None: base(tiny_folder)(IDS).logits}


@pytest.fixture
def pool(books, tiny_folder):
    return AdapterPool(base(tiny_folder), books)


@torch.no_grad()
def said(pool, ids=IDS):
    return pool.model(ids).logits


def test_after_switching_an_expert_says_what_it_says_alone(pool, truth):
    for name in ["medicine", "poems", None, "history.v2", "medicine", None, "poems"]:
        pool.activate(name)
        assert pool.active == name
        assert torch.equal(said(pool), truth[name]), name
    assert len({tuple(t[0, 5, :4].tolist()) for t in truth.values()}) == 4  # they do differ


def test_switching_moves_no_weight_and_changes_no_flag(pool, tiny_folder):
    before = {p.data_ptr() for p in pool.model.parameters()}
    for name in EXPERTS:
        pool.activate(name)
    everything = dict(pool.model.named_parameters())
    assert before <= {p.data_ptr() for p in everything.values()}
    versions = {name: p._version for name, p in everything.items()}
    for name in [*EXPERTS, None, *EXPERTS]:
        pool.activate(name)
        said(pool)
    now = dict(pool.model.named_parameters())
    assert now.keys() == everything.keys()
    assert all(now[name] is everything[name] and now[name]._version == versions[name] for name in now)
    assert not any(p.requires_grad for p in now.values())
    fresh = base(tiny_folder).state_dict()
    for name, tensor in pool.model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, fresh[name.replace(".base_layer", "")])


def test_rows_of_one_batch_have_experts_of_their_own(pool, truth):
    names = ["poems", None, "medicine", "history.v2"]
    pool.activate("medicine")  # what was active does not matter, and stays so
    with pool.rows(names):
        mixed = said(pool)
    for row, name in enumerate(names):
        with pool.rows([name] * 4):
            single = said(pool)
        assert torch.equal(single, truth[name])
        torch.testing.assert_close(mixed[row], truth[name][row], rtol=1e-4, atol=1e-4)
    assert torch.equal(said(pool), truth["medicine"])


@pytest.mark.parametrize(("tokens", "narrow"), [(10**9, 8), (0, 10**9)])
def test_both_ways_of_mixing_agree_with_peft(pool, tiny_folder, books, monkeypatch, tokens, narrow):
    """Joined and one by one, against PEFT's own mixed batches."""
    monkeypatch.setattr(module, "_FEW_TOKENS", tokens)
    monkeypatch.setattr(module, "_NARROW", narrow)
    other = PeftModel.from_pretrained(base(tiny_folder), str(books.path("poems")), adapter_name="poems")
    other.load_adapter(str(books.path("history.v2")), "history")
    with torch.no_grad():
        wanted = other.eval()(IDS, adapter_names=["history", "poems", "__base__", "poems"]).logits
    with pool.rows(["history.v2", "poems", None, "poems"]):
        torch.testing.assert_close(said(pool), wanted, rtol=1e-4, atol=1e-4)


def test_adapted_embeddings_and_heads_are_mixed_too(tiny_folder, tmp_path):
    books = ExpertLibrary(tmp_path / "experts")
    for seed, targets in enumerate([["embed_tokens", "q_proj"], ["lm_head"]]):
        books.add(f"e{seed}", adapter(tiny_folder, tmp_path / f"a{seed}", targets=targets, seed=seed))
    pool = AdapterPool(base(tiny_folder), books)
    with pool.rows(["e0", "e1", None, "e0"]):
        mixed = said(pool)
    for row, name in enumerate(["e0", "e1", None, "e0"]):
        pool.activate(name)
        torch.testing.assert_close(mixed[row], said(pool)[row], rtol=1e-4, atol=1e-4)


def test_loading_in_the_middle_of_a_batch_changes_nothing(pool, truth):
    for names in (["poems"] * 4, ["poems", None, "medicine", "poems"]):
        with pool.rows(names):
            pool.ensure(EXPERTS)
            found = said(pool)
            with pytest.raises(ModelError, match="a batch with rows"):
                pool.activate("medicine")
        for row, name in enumerate(names):
            torch.testing.assert_close(found[row], truth[name][row], rtol=1e-4, atol=1e-4)


def test_a_mixed_batch_holds_its_experts_once_more_and_lets_them_go(pool):
    with pool.rows(["medicine", "poems", None, None]):
        said(pool)
        joined = pool._joined
        assert len(joined._factors) > 0
    with pool.rows([None, "poems", "medicine", None]):
        assert pool._joined is joined  # the same experts in other rows
        said(pool)
    pool.limit = pool.bytes
    pool.ensure(["history.v2"])
    assert pool._joined is not joined
    assert not pool._joined._factors


def test_rows_generate(pool):
    names = ["poems", None, "medicine", "poems"]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    with pool.rows(names):
        mixed = pool.model.generate(IDS, **options)
    for row, name in enumerate(names):
        pool.activate(name)
        single = pool.model.generate(IDS[row : row + 1], **options | {"attention_mask": torch.ones(1, 12)})
        assert mixed[row].tolist()[: single.shape[1]] == single[0].tolist()


def test_a_batch_that_fails_leaves_nothing_behind(pool, truth):
    with pytest.raises(ZeroDivisionError), pool.rows(["poems", None, None, None]):
        1 / 0  # noqa: B018
    assert torch.equal(said(pool), truth[None])
    with pytest.raises(ModelError, match="2 experts given for a batch of 4"), pool.rows(["poems", None]):
        said(pool)
    assert torch.equal(said(pool), truth[None])


def test_memory_of_an_expert_is_its_own_size(pool, books):
    def tensors():
        return sum(p.numel() * p.element_size() for p in [*pool.model.parameters(), *pool.model.buffers()])

    empty = tensors()
    for count, name in enumerate(EXPERTS, 1):
        pool.ensure([name])
        assert pool.bytes == tensors() - empty == sum(books.card(n).bytes for n in list(EXPERTS)[:count])


def test_what_was_asked_longest_ago_makes_room(pool, books, truth):
    size = {name: books.card(name).bytes for name in EXPERTS}
    pool.limit = size["poems"] + size["medicine"]
    pool.activate("medicine")
    pool.activate("history.v2")
    pool.ensure(["medicine"])  # asked again, so the other one goes
    pool.activate("poems")
    assert pool.loaded == ["medicine", "poems"]
    pool.activate("history.v2")
    assert pool.loaded == ["poems", "history.v2"]
    assert pool.bytes <= pool.limit
    for name in ["medicine", "poems", "history.v2", None, "medicine"]:
        pool.activate(name)
        assert pool.bytes <= pool.limit
        assert torch.equal(said(pool), truth[name])


def test_what_answers_does_not_make_room(pool, books):
    size = {name: books.card(name).bytes for name in EXPERTS}
    pool.limit = size["poems"]
    pool.activate("poems")
    assert pool.fits(["medicine", "history.v2", None])
    assert not pool.fits(["poems", "medicine"])
    with pytest.raises(ModelError, match="Raise the limit"):
        pool.ensure(["medicine"])
    with pytest.raises(ModelError, match="Raise the limit"), pool.rows(["medicine", "poems", None, None]):
        raise AssertionError("not reached")
    pool.activate(None)
    with pool.rows(["medicine", "history.v2", None, None]):
        assert pool.loaded == ["medicine", "history.v2"]
        with pytest.raises(ModelError, match="medicine"):
            pool.ensure(["poems"])


def test_a_switch_that_fails_leaves_what_was_there(pool, books, truth):
    pool.activate("medicine")
    with pytest.raises(ConfigError, match="unknown 'law'"):
        pool.activate("law")
    assert torch.equal(said(pool), truth["medicine"])
    pool.limit = pool.bytes
    with pytest.raises(ModelError, match="Raise the limit"):
        pool.activate("poems")
    assert pool.active == "medicine"
    assert torch.equal(said(pool), truth["medicine"])


def test_an_empty_pool_is_the_base_and_fills_again(pool, truth, books):
    assert torch.equal(said(pool), truth[None])
    with pool.rows([None] * 4):
        assert torch.equal(said(pool), truth[None])
    sizes = [books.card(name).bytes for name in EXPERTS]
    for name in ["poems", "medicine", "poems"]:
        pool.limit = max(sizes)  # room for one of the larger two
        pool.activate(name)
        assert len(pool.loaded) == 1
        assert torch.equal(said(pool), truth[name])


def test_an_expert_that_was_removed_answers_no_more(tiny_folder, tmp_path):
    books = ExpertLibrary(tmp_path / "experts")
    one, two = (adapter(tiny_folder, tmp_path / f"a{seed}", seed=seed) for seed in (1, 2))
    books.add("same", one)
    pool = AdapterPool(base(tiny_folder), books)
    pool.activate("same")
    first = said(pool)
    books.remove("same")
    assert torch.equal(said(pool), first)  # while it is in use
    pool.activate(None)
    with pytest.raises(ConfigError, match="no expert 'same'"):
        pool.activate("same")
    assert pool.loaded == []
    books.add("same", two)
    pool.activate("same")
    with torch.no_grad():
        assert torch.equal(said(pool), alone(tiny_folder, two)(IDS).logits)
    books.rename("same", "other")
    pool.activate(None)
    pool.activate("other")
    with torch.no_grad():
        assert torch.equal(said(pool), alone(tiny_folder, two)(IDS).logits)


def test_a_file_that_was_damaged_later(tiny_folder, books, tmp_path):
    shutil.copytree(books.folder, tmp_path / "experts")
    copy = ExpertLibrary(tmp_path / "experts")
    pool = AdapterPool(base(tiny_folder), copy)
    path = copy.path("poems") / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    for _ in range(2):
        with pytest.raises(ModelError, match=r"poems: cannot be loaded .* Remove the expert"):
            pool.activate("poems")
    assert pool.loaded == []
    with torch.no_grad():
        assert torch.equal(said(pool), base(tiny_folder)(IDS).logits)
    pool.activate("medicine")
    with torch.no_grad():
        assert torch.equal(said(pool), alone(tiny_folder, copy.path("medicine"))(IDS).logits)


def test_many_threads_get_their_own_answers(pool, books, truth):
    pool.limit = books.card("poems").bytes + books.card("medicine").bytes
    wrong = []

    def ask(names):
        for name in names:
            with pool.rows([name, None, name, None]):
                found = said(pool)
            wrong.extend(
                (name, row)
                for row, own in enumerate([name, None, name, None])
                if not torch.allclose(found[row], truth[own][row], atol=1e-4)
            )

    order = [*EXPERTS, None]
    threads = [threading.Thread(target=ask, args=(order[i:] * 3 + order[:i],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_half_precision_experts_stay_so(tiny_folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base(tiny_folder), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.half().save_pretrained(tmp_path / "half")
    books = ExpertLibrary(tmp_path / "experts")
    card = books.add("half", tmp_path / "half")
    pool = AdapterPool(base(tiny_folder), books)
    pool.activate("half")
    assert pool.bytes == card.bytes == 2 * 2 * (4 * 32 + 4 * 32)
    assert bool(torch.isfinite(said(pool)).all())


def test_open_pool_finds_the_base(books, truth, tmp_path):
    pool, tokenizer = open_pool(books)
    pool.activate("poems")
    assert torch.equal(said(pool), truth["poems"])
    assert tokenizer.pad_token
    with pytest.raises(ModelError, match="no experts here"):
        open_pool(ExpertLibrary(tmp_path))
