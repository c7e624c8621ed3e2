"""A library's router: fitted once, kept in the library's folder, fitted anew when the library changes."""

from __future__ import annotations

import os
import subprocess
import sys

import expert_kit
import pytest
import torch
from routing_kit import EXAMPLES, NEW
from tiny import tiny_tokenizer

from retain.errors import ConfigError, DataError
from retain.experts.pool import AdapterPool
from retain.experts.routing import opening
from retain.experts.routing.base import Router
from retain.experts.routing.everyday import EVERYDAY
from retain.experts.routing.opening import ROUTERS, open_router
from retain.models.states import StateReader

OTHERS = list(EVERYDAY[::4])


@pytest.fixture
def library(tiny_folder, tmp_path):
    found = expert_kit.ExpertLibrary(tmp_path / "experts")
    made = expert_kit.adapter(tiny_folder, tmp_path / "adapter", 2, ["q_proj"])
    for name, examples in EXAMPLES.items():
        found.add(name, made, examples=examples)
    return found


@pytest.fixture
def pool(tiny_folder, library):
    return AdapterPool(expert_kit.base(tiny_folder), library)


@pytest.fixture
def fits(monkeypatch):
    """Names of the routers that were fitted."""
    found = []
    real = Router.fit

    def fit(self, *args, **more):
        found.append(self.name)
        return real(self, *args, **more)

    monkeypatch.setattr(Router, "fit", fit)
    return found


@pytest.mark.parametrize("name", ROUTERS)
def test_it_is_fitted_once(library, pool, fits, name):
    prompts = [prompt for texts in NEW.values() for prompt in texts]
    first = open_router(library, pool, tiny_tokenizer(), name, others=OTHERS)
    folder = library.folder / ".routers" / name
    assert sorted(p.name for p in folder.iterdir()) == ["router.json", "router.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == [name], "nothing half-written is left"
    again = open_router(library, pool, tiny_tokenizer(), name, others=OTHERS)
    assert fits == [name]
    assert again.fingerprint == first.fingerprint
    for a, b in zip(first.route(prompts), again.route(prompts)):
        assert (a.expert, a.why) == (b.expert, b.why)
        assert a.confidence == pytest.approx(b.confidence, abs=1e-6)
    assert library.names() == sorted(EXAMPLES), "a router is no expert"


@pytest.mark.parametrize(
    ("change", "name", "anew"),
    [
        (lambda lib: lib.describe("sums", examples=EXAMPLES["sums"][:5]), "keyword", True),
        (lambda lib: lib.describe("sums", keywords=["digits"]), "keyword", True),
        (lambda lib: lib.describe("sums", keywords=["digits"]), "gate", False),
        (lambda lib: lib.describe("sums", keywords=["digits"]), "combined", True),
        (lambda lib: lib.describe("sums", language="en"), "keyword", False),
        (lambda lib: lib.rename("sums", "numbers"), "gate", True),
        (lambda lib: lib.remove("sums"), "prototype", True),
    ],
)
def test_it_is_fitted_anew_when_what_it_learnt_from_changes(library, pool, fits, change, name, anew):
    open_router(library, pool, tiny_tokenizer(), name, others=OTHERS)
    change(library)
    router = open_router(library, pool, tiny_tokenizer(), name, others=OTHERS)
    assert len(fits) == (2 if anew else 1)
    assert sorted(router.experts) == library.names()


def test_other_questions_for_nobody_fit_it_anew(library, fits):
    open_router(library, name="keyword", others=OTHERS)
    open_router(library, name="keyword", others=OTHERS[:-1])
    open_router(library, name="keyword", others=OTHERS[:-1])
    assert len(fits) == 2


def test_a_damaged_router_is_made_anew(library, fits):
    open_router(library, name="keyword", others=OTHERS)
    (library.folder / ".routers" / "keyword" / "router.json").write_text("{")
    assert open_router(library, name="keyword", others=OTHERS).route([NEW["poems"][0]])[0].expert == "poems"
    assert len(fits) == 2
    open_router(library, name="keyword", others=OTHERS)
    assert len(fits) == 2


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_library_that_cannot_be_written_still_routes(library):
    library.folder.chmod(0o500)
    said = []
    try:
        assert open_router(library, name="keyword", others=OTHERS, say=said.append).experts
    finally:
        library.folder.chmod(0o700)
    assert "cannot be written" in said[0]


def test_a_disk_that_refuses_is_told(library, monkeypatch):
    monkeypatch.setattr(opening, "_replace", lambda *args: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    said = []
    assert open_router(library, name="keyword", others=OTHERS, say=said.append).experts
    assert "Read-only file system" in said[0]


def test_an_expert_without_questions_is_left_out_and_told(library):
    library.describe("sums", examples=["only one", "only one"])
    said = []
    router = open_router(library, name="keyword", others=OTHERS, say=said.append)
    assert sorted(router.experts) == ["medicine", "poems"]
    assert len(said) == 1
    assert said[0].startswith("sums: fewer than 2 questions")
    for name in EXAMPLES:
        library.describe(name, examples=[])
    with pytest.raises(DataError, match="no expert with 2 or more questions"):
        open_router(library, name="keyword", others=OTHERS)


def test_mistakes_are_named(library):
    with pytest.raises(ConfigError, match="Did you mean 'keyword'"):
        open_router(library, name="keywords")
    with pytest.raises(ConfigError, match=r"'gate' reads questions with the base model.*Use `keyword`"):
        open_router(library, name="gate")


def test_the_pool_is_left_as_it_was(library, pool):
    pool.activate("poems")
    for name in ROUTERS:
        open_router(library, pool, tiny_tokenizer(), name, others=OTHERS[:4]).route(["What is 2 + 2?"])
        assert pool.active == "poems"


def test_the_base_is_read_while_an_expert_is_active(tiny_folder, library, pool):
    plain = StateReader(expert_kit.base(tiny_folder), tiny_tokenizer(), 1.0)(NEW["sums"])
    reader = opening.make("gate", pool, tiny_tokenizer()).reader
    assert reader.layers == 1, "a quarter of two layers"
    whole = StateReader(pool.model, tiny_tokenizer(), 1.0, pool.lock)
    pool.activate("poems")
    assert whole(NEW["sums"]) == pytest.approx(plain, abs=1e-5)
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7]])
        adapted = pool.model(input_ids=ids).logits
        pool.activate(None)
        assert not torch.allclose(adapted, pool.model(input_ids=ids).logits), "the expert acts again"


def test_questions_for_nobody_are_the_core_suite_and_everyday_ones():
    from retain.probes.suite import load_probes

    prompts = [
        item.fields["prompt"] for probe in load_probes("core") for item in probe.items if "prompt" in item.fields
    ]
    assert opening.core_prompts() == list(dict.fromkeys(prompts))
    assert opening.default_others() == [*opening.core_prompts(), *EVERYDAY]
    assert len(set(EVERYDAY)) == len(EVERYDAY) == 120
    chinese = [text for text in EVERYDAY if any("\u4e00" <= c <= "\u9fff" for c in text)]
    assert len(chinese) == 60


def test_a_saved_keyword_router_needs_no_torch(library):
    open_router(library, name="keyword", others=OTHERS)
    code = f"""
import sys
from retain.experts.library import ExpertLibrary
from retain.experts.routing.opening import open_router
router = open_router(ExpertLibrary({str(library.folder)!r}), name="keyword", others={OTHERS!r})
print(router.route([{NEW["poems"][0]!r}])[0].expert, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["poems", "False"]


def test_prototypes_of_embeddings_need_no_base(library, tiny_embedding, fits):
    pytest.importorskip("sentence_transformers")
    router = open_router(library, name="prototype", embedding=str(tiny_embedding), others=OTHERS)
    assert router.learned["prototypes"].shape[0] == len(EXAMPLES)
    assert router.route(NEW["poems"])[0].scores.keys() == EXAMPLES.keys()
    open_router(library, name="prototype", embedding=str(tiny_embedding), others=OTHERS)
    assert len(fits) == 1
