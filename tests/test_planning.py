"""What a run takes: parameters are those of the model, memory is what a learner of DeepSpeed's holds."""

import gc
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from dolly import LARGE, SMALL, TRAINING_ONLY, Layout
from example_text import text, text_tokenizer
from test_learner import free_port
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, PreTrainedConfig

from raykd.algorithms import GKD, SFT, MiniLLM
from raykd.algorithms.token_divergences import ReverseKL, TopK
from raykd.collate import LossTerm
from raykd.experiment import Experiment, LearnerConfig, LoRA, Model, Optimiser, Stage, TeacherConfig
from raykd.models import vocabulary
from raykd.planning import Plan, Size, Worker, gpu_bytes, plan
from raykd.projection import Head
from raykd.records import Rollout, Row, Source, Totals
from raykd.sources import Pairs

VOCAB, WIDTH, LAYERS, TEACHER_WIDTH, BUCKET = 512, 384, 2, 96, 400_000


def llama(**changes: Any) -> dict[str, Any]:
    shape = {"hidden_size": WIDTH, "intermediate_size": 768, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    return {"model_type": "llama", "vocab_size": VOCAB, "tie_word_embeddings": False, **shape, **changes}


def config(fields: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(**{name: value for name, value in fields.items() if name != "model_type"})


@pytest.mark.parametrize(
    "shape",
    [
        config(llama()),
        config(llama(tie_word_embeddings=True)),
        GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=300),
        MixtralConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_local_experts=8, vocab_size=100
        ),
    ],
    ids=["llama", "tied", "gpt2", "mixtral"],
)
def test_parameters_are_those_of_the_model(shape: PreTrainedConfig) -> None:
    size, model = Size.of(shape), AutoModelForCausalLM.from_config(shape)
    assert size.parameters == size.learned == sum(p.numel() for p in model.parameters())


def test_of_a_mixture_of_experts_a_token_keeps_what_its_experts_compute() -> None:
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 4096, "num_hidden_layers": 1, "num_attention_heads": 2}
    one, two = (Size.of(MixtralConfig(**shape, vocab_size=50, num_local_experts=8, num_experts_per_tok=k)) for k in (1, 2))
    assert two.parameters == one.parameters
    assert two.kept == pytest.approx(2 * one.kept, rel=0.05), "nearly all of it is in the experts"


def test_adapters_alone_are_learned() -> None:
    size = Size.of(config(llama()), LoRA(rank=4, targets=("q_proj",)))
    assert size.learned == LAYERS * 4 * (WIDTH + WIDTH)
    assert size.parameters == Size.of(config(llama())).parameters + size.learned


def experiment(learner: LearnerConfig, **changes: Any) -> Experiment:
    tokenizer = str(text().tokenizer)
    fields: dict[str, Any] = {
        "name": "planned",
        "student": Model(path=tokenizer, scratch=llama()),
        "teacher": Model(path=tokenizer, scratch=llama(hidden_size=TEACHER_WIDTH)),
        "data": Pairs(path=str(text().pairs)),
        "stages": (Stage(algorithm=GKD(), steps=1, batch_size=16),),
        "max_prompt": 8,
        "max_response": 8,
        "learner": learner,
        "teachers": TeacherConfig(dtype=learner.dtype),
    }
    return Experiment(**(fields | changes))


def planned(learner: LearnerConfig, **changes: Any) -> Plan:
    asked, tokenizer = experiment(learner, **changes), text_tokenizer()
    return plan(asked, tokenizer, vocabulary(asked, tokenizer))


def worker(of: Plan, role: str) -> Worker:
    return next(worker for worker in of.workers if worker.role == role)


# --- what DeepSpeed holds -----------------------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "float32, two ranks": {"dtype": "float32", "ranks": 2},
    "ZeRO-1, float32": {"dtype": "float32", "zero_stage": 1},
    "bfloat16": {},
    "bfloat16, two ranks": {"ranks": 2},
    "ZeRO-2": {"zero_stage": 2},
    "ZeRO-2, two ranks": {"zero_stage": 2, "ranks": 2},
    "ZeRO-3": {"zero_stage": 3},
    "ZeRO-3, two ranks": {"zero_stage": 3, "ranks": 2},
    "adapters": {"lora": LoRA(rank=4)},
    "layers computed again": {"dtype": "float32", "activation_checkpointing": True},
}
LEARNERS = {name: LearnerConfig(micro_batch=2, **settings) for name, settings in SETTINGS.items()}


def held_bytes() -> int:
    """Of all tensors that are alive."""
    gc.collect()
    storages = {}
    for tensor in filter(torch.is_tensor, gc.get_objects()):
        for storage in [part.untyped_storage() for part in (tensor, tensor.grad) if part is not None and not part.is_meta]:
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_of(step: Any) -> int:
    """Bytes that were allocated at the same time while it ran, beyond those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    profiler: Any = profile.profiler  # it has no usable annotations
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def text_of(index: int) -> Rollout:
    return Rollout(prompt_id=str(index), sample=0, prompt_tokens=(1,) * 8, tokens=tuple(range(3, 11)), source=Source.DATASET)


def learn(config: LearnerConfig, rank: int, port: int, folder: str, results: Any) -> None:
    """One rank, in a process of its own: the bytes that it holds, at most, while it learns from two texts."""
    import raykd.rank
    from raykd.learner import Learner

    raykd.rank.REDUCE_BUCKET = BUCKET
    head = Head(weight=torch.randn(VOCAB, TEACHER_WIDTH, dtype=getattr(torch, config.dtype)))
    learner = Learner(folder, config=config, rank=rank, address=("127.0.0.1", port), vocab_size=VOCAB, teacher_head=head)
    del head
    learner.begin(Optimiser())
    rows = [Row(rollout=text_of(index)) for index in range(2)]
    terms = [LossTerm(algorithm=SFT(), rows=rows, totals=Totals.of(rows * config.ranks))]
    learner.step(terms, 1e-6)
    results.put(held_bytes() + peak_of(lambda: learner.step(terms, 1e-6)))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("planned")
    AutoModelForCausalLM.from_config(config(llama()), dtype=torch.float32).save_pretrained(folder)
    return str(folder)


@pytest.mark.stack
@pytest.mark.parametrize("learner", LEARNERS.values(), ids=LEARNERS)
def test_a_learner_holds_what_was_planned(student: str, learner: LearnerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raykd.planning.REDUCE_BUCKET", BUCKET)
    rank = worker(planned(learner), "learner rank")
    context = multiprocessing.get_context("spawn")
    results, port = context.Queue(), free_port()
    processes = [context.Process(target=learn, args=(learner, r, port, student, results)) for r in range(learner.ranks)]
    for process in processes:
        process.start()
    held = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join(60)
    for found in held:
        assert rank.bytes(certain=True) <= found == pytest.approx(rank.bytes(), rel=0.15)


# --- what is said of it -------------------------------------------------------------------------------------------------------


def test_stages_of_zero_share_more_and_more() -> None:
    held = [worker(planned(LearnerConfig(ranks=4, zero_stage=stage)), "learner rank").parts for stage in (1, 2, 3)]
    alone = worker(planned(LearnerConfig()), "learner rank").parts
    sizes = [{part.name: part.bytes for part in parts} for parts in (alone, *held)]
    for name, shared in (("AdamW", (1, 4, 4, 4)), ("gradients", (1, 1, 4, 4)), ("weights", (1, 1, 1, 4))):
        assert [sizes[0][name] / of[name] for of in sizes] == [pytest.approx(share) for share in shared], name


def test_what_is_offloaded_is_not_on_the_gpu() -> None:
    offloaded = planned(LearnerConfig(gpus=1, offload_optimiser=True))
    assert "AdamW" not in {part.name for part in worker(offloaded, "learner rank").parts}
    assert any(note.startswith("AdamW is in the memory of the machines") for note in offloaded.notes)


def test_an_engine_beside_the_scorer_has_weights_of_its_own() -> None:
    mixes = Stage(algorithm=MiniLLM(text_coefficient=0), steps=1)
    alone, both = (worker(planned(LearnerConfig(), **changes), "teacher") for changes in ({}, {"stages": (mixes,)}))
    names = [part.name for part in both.parts]
    assert "weights of the engine that writes" in names and "KV cache" in names
    assert "weights of the engine that writes" not in [part.name for part in alone.parts]


def test_what_travels_has_the_fewest_bytes() -> None:
    def scores(divergence: Any) -> str:
        stages = (Stage(algorithm=GKD(divergence=divergence), steps=1, batch_size=16),)
        return next(note for note in planned(LearnerConfig(), stages=stages).notes if note.startswith("stages.0"))

    assert f"{TEACHER_WIDTH * 2 + 8} bytes (hidden)" in scores(ReverseKL())
    assert f"{8 * 10 + 4 + 8} bytes (top)" in scores(TopK(of=ReverseKL(), k=10))
    assert "at most 25.6 kB of them" in scores(ReverseKL()), "16 responses of 8 tokens of 200 bytes"


def test_what_no_gpu_can_hold_is_refused_with_what_would_help() -> None:
    of = planned(LearnerConfig(gpus=1))
    needed = worker(of, "learner rank").bytes(certain=True)
    assert not of.refusal(needed + 1)
    refusal = of.refusal(needed - 1)
    assert "for AdamW" in refusal and "learner.zero_stage 3" in refusal
    assert not planned(LearnerConfig()).refusal(1), "nothing is on a GPU"


def test_the_largest_of_a_cluster_s_gpus_counts_where_all_are_known() -> None:
    assert gpu_bytes(["A100", "H200"]) == 141 * 2**30
    assert gpu_bytes(["A100", "something new"]) is None
    assert gpu_bytes([]) is None


def test_of_a_quantised_teacher_the_files_count(tmp_path: Path) -> None:
    text_tokenizer().save_pretrained(tmp_path)
    config(llama(hidden_size=TEACHER_WIDTH, quantization_config={"quant_method": "awq"})).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    teacher = worker(planned(LearnerConfig(), teacher=Model(path=str(tmp_path))), "teacher")
    assert next(part for part in teacher.parts if part.name == "weights").bytes == 1000


@pytest.mark.parametrize("layout", [SMALL, LARGE, TRAINING_ONLY])
def test_the_layouts_of_the_experiments_fit_the_gpus_that_they_name(layout: Layout) -> None:
    one_and_a_half, three, seven, thirteen = (
        llama(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=32, vocab_size=50_257)
        for width, inner, layers in ((2048, 5504, 26), (3200, 8640, 26), (4096, 11008, 32), (5120, 13824, 40))
    )
    models = {SMALL: (one_and_a_half, three), LARGE: (seven, thirteen), TRAINING_ONLY: (thirteen, None)}
    student, teacher = models[layout]
    tokenizer = str(text().tokenizer)
    stage = Stage(algorithm=MiniLLM(text_coefficient=0) if teacher else SFT(), steps=1)
    of = planned(
        layout.learner,
        student=Model(path=tokenizer, scratch=student),
        teacher=Model(path=tokenizer, scratch=teacher) if teacher else None,
        stages=(stage,),
        max_prompt=256,
        max_response=256,
        teachers=layout.teachers,
        rollout=layout.rollout,
    )
    for each in of.workers:
        assert each.bytes() < 80e9, each
