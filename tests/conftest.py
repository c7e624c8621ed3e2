"""Fixtures of all tests: offline, quiet, one tiny model in memory."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: waking a second thread costs more than it saves
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-pair", action="store_true", help="also run every two methods alone, not only in groups")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--every-pair"):
        left_out = [item for item in items if item.get_closest_marker("every_pair")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("every_pair")]


@pytest.fixture(scope="session", autouse=True)
def _libraries_out_of_sight() -> None:
    """Every training ends with a full garbage collection, which looks at the million objects of the libraries each
    time. Frozen, they are not looked at, and a training of a tiny model takes half of the time."""
    import peft  # noqa: F401

    import retain.training.on_policy  # noqa: F401

    gc.collect()
    gc.freeze()


#: Modules whose runs are looked at for other things than the charts of their reports; they take as long as the run.
WITHOUT_CHARTS = {
    *("test_avoiding", "test_blocks", "test_bottleneck", "test_distill", "test_packnet", "test_prioritised"),
    *("test_remembering", "test_replay", "test_estimate", "test_resume", "test_own_data", "test_presets"),
    *("test_workload", "test_totals", "test_pipeline_mistakes", "test_made", "test_domains", "test_trackers"),
    *("test_bench_retention", "test_bench_dynamics", "test_bench_routing", "test_synth", "test_pipeline"),
    *("test_private", "test_divergence_run", "test_examples", "test_examples_harness", "test_sdft", "test_advise"),
    *("test_refreshing", "test_advisor", "test_rules"),
}


@pytest.fixture(scope="module", autouse=True)
def _charts_where_they_are_looked_at(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__.rpartition(".")[2] in WITHOUT_CHARTS:
            patch.setattr("retain.report.figures.draw", lambda *given: [])
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model and its tokenizer, as `model.name` takes it."""
    from tiny import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("models") / "SmolLM2-135M-Instruct"
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is found in, or left in, the user's cache."""
    os.environ["RETAIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["TRACKIO_DIR"] = str(tmp_path_factory.mktemp("trackio"))


@pytest.fixture
def fresh_precision() -> Callable[[], None]:
    """accelerate keeps the precision of the last trainer for the process; passes outside a trainer would take it."""

    def forget() -> None:
        state = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
        if state is not None and state._shared_state and state().mixed_precision != "no":
            state._reset_state()

    return forget


@pytest.fixture(autouse=True)
def _no_half_precision_left(fresh_precision: Callable[[], None]) -> Iterator[None]:
    yield
    fresh_precision()


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that a run needs: the tiny model, two tasks, old rows and probes."""
    from run_kit import workshop

    return workshop(tmp_path_factory.mktemp("shop"))


@pytest.fixture
def tiny_cache(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes `starter` the tiny model, in this process and in those it starts."""
    monkeypatch.setenv("RETAIN_CACHE", str(tiny_folder.parent))
    return tiny_folder


@pytest.fixture(scope="session")
def _thin_suites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from retain.probes.suite import BUILT_IN

    folder = tmp_path_factory.mktemp("suites")
    for path in BUILT_IN.rglob("*.jsonl"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        thin = folder / path.relative_to(BUILT_IN)
        thin.parent.mkdir(exist_ok=True)
        thin.write_text("".join(lines[:: max(1, len(lines) // 4)]), encoding="utf-8")
    return folder


@pytest.fixture
def thin_suites(_thin_suites: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in suites with a few items of each probe: for runs that show something else."""
    monkeypatch.setattr("retain.probes.suite.BUILT_IN", _thin_suites)


@pytest.fixture(scope="session")
def tiny_embedding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random encoder, which sentence-transformers takes with mean pooling."""
    import copy

    import torch
    from tiny import tiny_tokenizer
    from transformers import BertConfig, BertModel

    folder, tokenizer = tmp_path_factory.mktemp("embedding"), copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = None  # with one, texts would be embedded as messages
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=len(tokenizer), initializer_range=0.3, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    """The tiny tokenizer."""
    from tiny import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture
def model(tokenizer):
    """A new tiny random model."""
    from tiny import tiny_model

    return tiny_model(tokenizer)
