"""Fixtures for all tests: asyncio, and tiny random models, built once per session."""

# ruff: noqa: PLC0415 - torch is loaded by the tests that want it
from __future__ import annotations

import atexit
import gc
import importlib.util
import os
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# The workers of a parallel run share the cores. More threads would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine may be slow at any moment.
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("full", UNTIMED)
# A run without the slow tests tries fewer examples of each property; `make test` tries all.
settings.register_profile("quick", UNTIMED, max_examples=25)

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user, assistant') }}"
    "{% endif %}"
    "<{{ m.role }}>{{ m.content }}</s>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CORPUS = [
    "the cat sat on the mat and the dog ran to the sun",
    "a big red ball is in the box with the small blue hat",
]
SPECIALS = ["<pad>", "</s>"]
# Small enough to build in a blink; weights large enough that greedy choices are no near ties.
SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.3,
}
SPECIAL_IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def device() -> Any:
    """The device of engines and tensors: the GPU if there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def several_threads() -> Generator[int]:
    """Let torch compute with two threads, whatever this machine has."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def byte_level() -> Any:
    """A byte-level BPE tokenizer: any text, every byte a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="session")
def byte_fallback() -> Any:
    """A tokenizer in the manner of Llama 2: spaces as a mark, unknown characters as bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = [
        *SPECIALS,
        "<unk>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz.!",
        "▁a",
        "▁b",
        "ab",
        "▁ab",
    ]
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b")]
    model = models.BPE(
        {word: i for i, word in enumerate(words)},
        merges,
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = TEMPLATE
    return fast


def _config(architecture: str, vocabulary: int, **options: Any) -> Any:
    import transformers as tf

    fields: dict[str, dict[str, Any]] = {
        "Llama": {"num_key_value_heads": 2},
        "Qwen2": {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
        },
        "Mistral": {"num_key_value_heads": 2, "sliding_window": 8},
        "Gemma2": {"num_key_value_heads": 2, "sliding_window": 8, "head_dim": 8},
        "Gemma3Text": {
            "num_key_value_heads": 2,
            "sliding_window": 8,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "GPT2": {"n_inner": 48},
        "Bert": {},
        "Mamba": {},
    }
    config = getattr(tf, f"{architecture}Config")
    return config(
        **{
            "vocab_size": vocabulary,
            "max_position_embeddings": 256,
            **SIZE,
            **SPECIAL_IDS,
            **fields.get(architecture, {}),
            **options,
        }
    )


def _save(model: Any, tokenizer: Any, path: Path) -> str:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory, byte_level: Any) -> Callable[..., str]:
    """Return the folder of a tiny random causal LM: `language_model("Llama", **config)`."""
    made: dict[tuple[Any, ...], str] = {}

    def make(
        architecture: str = "Llama", tokenizer: Any = None, seed: int = 0, **options: Any
    ) -> str:
        import torch
        from transformers import AutoModelForCausalLM

        tokenizer = byte_level if tokenizer is None else tokenizer
        key = (architecture, id(tokenizer), seed, *sorted((k, repr(v)) for k, v in options.items()))
        if key not in made:
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(
                _config(architecture, len(tokenizer), **options)
            )
            made[key] = _save(model, tokenizer, tmp_path_factory.mktemp(architecture))
        return made[key]

    return make


@pytest.fixture(scope="session")
def gguf_model(
    tmp_path_factory: pytest.TempPathFactory, language_model: Callable[..., str]
) -> Callable[..., Path]:
    """Write the tiny Llama of `language_model` as GGUF: `gguf_model(without="lm_head.weight")`."""

    def write(**options: Any) -> Path:
        pytest.importorskip("gguf")
        from tests.gguf_files import write_gguf

        file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
        write_gguf(file, Path(language_model("Llama")), **options)
        return file

    return write


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory: pytest.TempPathFactory, byte_level: Any) -> Callable[..., str]:
    """Return the folder of a tiny random classifier: `reward_model("Bert", labels=1, seed=0)`."""
    made: dict[tuple[Any, ...], str] = {}

    def make(
        architecture: str = "Llama",
        labels: int = 1,
        seed: int = 0,
        tokenizer: Any = None,
        **options: Any,
    ) -> str:
        import torch
        from transformers import AutoModelForSequenceClassification

        tokenizer = byte_level if tokenizer is None else tokenizer
        key = (
            architecture,
            labels,
            seed,
            id(tokenizer),
            *sorted((k, repr(v)) for k, v in options.items()),
        )
        if key not in made:
            torch.manual_seed(seed)
            config = _config(architecture, len(tokenizer), num_labels=labels, **options)
            model = AutoModelForSequenceClassification.from_config(config)
            made[key] = _save(model, tokenizer, tmp_path_factory.mktemp(f"{architecture}-reward"))
        return made[key]

    return make


@pytest.fixture(scope="session")
def finish() -> Callable[..., Any]:
    """Sample a draw to its end: `candidates, deltas = await finish(engine, draw)`."""
    from infer_align.types import Candidate

    async def collect(engine: Any, draw: Any) -> tuple[list[Any], list[Any]]:
        async with engine.sample(draw) as stream:
            events: Iterable[Any] = [event async for event in stream]
        finished = [e for e in events if isinstance(e, Candidate)]
        return sorted(finished, key=lambda c: c.index), [
            e for e in events if not isinstance(e, Candidate)
        ]

    return collect


def pytest_configure(config: pytest.Config) -> None:
    """Choose the number of examples before the test modules are imported, which read it."""
    is_quick = "not (slow" in config.getoption("markexpr")
    settings.load_profile("quick" if is_quick else "full")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return the number of workers: a third of the tests' time waits for servers and deadlines."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, cores * 3 // 2)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect without looking for garbage: what tests import stays. This saves seconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


# The interpreter frees at its end what was frozen. Libraries report it as leaked otherwise. Freeing
# it takes seconds, so a worker of a parallel run, which has sent its results, ends without that.
if "PYTEST_XDIST_WORKER" in os.environ:
    atexit.register(os._exit, 0)
else:
    atexit.register(gc.unfreeze)


# A file whose tests take long begins early: at the end of a run, no worker waits for another's.
LONG_FILES = (
    "tests/kernels/test_interpreter.py",
    "tests/server/test_workers.py",
    "tests/kernels/test_compiled.py",
    "tests/server/test_profile_store.py",
    "tests/bench/quality/test_command.py",
    "tests/bench/test_serve_faults.py",
    "tests/benchmarks/test_scenarios.py",
    "tests/benchmarks/test_soak.py",
    "tests/test_repo.py",
    "tests/fitting/test_fit_value.py",
)


def reads_vllm_server(item: pytest.Item) -> bool:
    """Return True if the test uses the server over vLLM that `tests/engines/vllm` starts."""
    in_folder = Path(__file__).parent / "engines" / "vllm" in item.path.parents
    return in_folder and "live" in getattr(item, "fixturenames", ())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Choose which tests one worker of a parallel run takes together, and in which order.

    A worker takes the tests of a file, so that no other builds the file's fixtures again. Tests on
    vLLM are two groups: those of the server that they share, and those that start engines of their
    own. An engine that starts in the server's process would take over vLLM's metrics.

    Tests on vLLM are skipped if it is not installed. Importing it to find out takes a second.
    """
    is_installed = importlib.util.find_spec("vllm") is not None
    orders = {name: i for i, name in enumerate(LONG_FILES)}
    files = {item: item.nodeid.partition("::")[0] for item in items}

    def start_position(item: pytest.Item) -> int:
        if item.get_closest_marker("vllm"):
            return -1
        return orders.get(files[item], len(orders))

    items.sort(key=start_position)
    for item in items:
        if item.get_closest_marker("vllm"):
            group = "vllm server" if reads_vllm_server(item) else "vllm"
            item.add_marker(pytest.mark.xdist_group(group))
            if not is_installed:
                item.add_marker(pytest.mark.skip("vLLM is not installed"))
        elif not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(files[item]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Name a test of a parallel run as a run without groups does.

    xdist appends the group. The names of failed tests are kept for `make test-failed`, which runs
    all tests if it knows none of the names.
    """
    is_from_worker = hasattr(report, "node")
    if is_from_worker:
        report.nodeid = report.nodeid.rpartition("@")[0]


@pytest.fixture(scope="session")
def pooling_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """Return a random reward model in the shape of the demo's LM: `pooling_model(labels)`."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    from infer_align import demo

    made: dict[int, str] = {}

    def make(labels: int) -> str:
        if labels not in made:
            config = LlamaConfig.from_pretrained(
                demo.path(demo.LM), num_labels=labels, architectures=None
            )
            torch.manual_seed(labels)
            model = LlamaForSequenceClassification(config)
            torch.nn.init.normal_(model.score.weight)
            made[labels] = str(tmp_path_factory.mktemp(f"rm{labels}"))
            model.save_pretrained(made[labels])
            AutoTokenizer.from_pretrained(demo.path(demo.LM)).save_pretrained(made[labels])
        return made[labels]

    return make
