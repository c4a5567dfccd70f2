"""What a run takes: parameters are those of the model, memory is what a learner of DeepSpeed's holds."""

import gc
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from dolly import LARGE, SMALL, TRAINING_ONLY, Layout
from example_text import text, text_tokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, PreTrainedConfig

from raykd.algorithms import GKD, SFT, MiniLLM
from raykd.algorithms.token_divergences import ReverseKL, TopK
from raykd.collate import LossTerm
from raykd.experiment import (
    EngineConfig,
    Experiment,
    LearnerConfig,
    LoRA,
    Model,
    Optimiser,
    RolloutConfig,
    Stage,
    TeacherConfig,
)
from raykd.head import Head
from raykd.models import vocabulary
from raykd.planning import Plan, Room, Size, Worker, gpu_bytes, plan
from raykd.planning.durations import RATES, REACHED, Rates, Work, Workload, workload
from raykd.rank import meeting_place
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


def certain(worker: Worker) -> int:
    """Bytes of what it holds on its device but for estimates."""
    return sum(worker.certain(Room("GPU" if worker.gpus else "node", 0, 0)).values())


def load(stage: Stage, *, student: Size | None = None, teacher: Size | None = None, **changes: Any) -> Workload:
    asked = experiment(changes.pop("learner", LearnerConfig()), stages=(stage,), **changes)
    return workload(asked, stage, student or Size.of(config(llama())), teacher, VOCAB)


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
    "adapters, float32": {"dtype": "float32", "lora": LoRA(rank=4)},
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
    return Rollout(prompt_id=str(index), sample=0, prompt_tokens=(index,) * 8, tokens=tuple(range(3, 11)), source=Source.DATASET)


def learn(config: LearnerConfig, rank: int, port: int, folder: str, results: Any) -> None:
    """One rank, in a process of its own: the bytes that it holds, at most, while it learns from two texts, and the flops."""
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
    held = held_bytes() + peak_of(lambda: learner.step(terms, 1e-6))
    with FlopCounterMode(display=False) as counter:
        learner.step(terms, 1e-6)
    results.put((held, counter.get_total_flops()))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("planned")
    AutoModelForCausalLM.from_config(config(llama()), dtype=torch.float32).save_pretrained(folder)
    return str(folder)


@pytest.mark.stack
@pytest.mark.parametrize("learner", LEARNERS.values(), ids=LEARNERS)
def test_a_learner_holds_what_was_planned(student: str, learner: LearnerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raykd.planning.memory.REDUCE_BUCKET", BUCKET)
    rank = worker(planned(learner), "learner rank")
    context = multiprocessing.get_context("spawn")
    results, place = context.Queue(), meeting_place("127.0.0.1")
    processes = [context.Process(target=learn, args=(learner, r, place.port, student, results)) for r in range(learner.ranks)]
    for process in processes:
        process.start()
    found = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join(60)
    batch = 2 * learner.ranks
    size = Size.of(config(llama()), learner.lora)
    flops = load(Stage(algorithm=SFT(), steps=1, batch_size=batch), student=size, learner=learner).learning.flops
    for held, computed in found:
        assert certain(rank) <= held == pytest.approx(rank.bytes(), rel=0.15)
        if learner.dtype == "float32":  # products of bfloat16 to float32 are not PyTorch's, and are not counted
            # Nobody computes a text's last token, a layer's last product again, or a gradient of embeddings that are not learned.
            assert flops > computed == pytest.approx(flops, rel=0.14)


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


@pytest.mark.parametrize(("device", "gpus"), [("GPU", 1), ("node", 0)])
def test_what_no_gpu_and_no_node_can_hold_is_refused_with_what_would_help(device: str, gpus: int) -> None:
    of = planned(LearnerConfig(gpus=gpus))
    needed, plenty = certain(worker(of, "learner rank")), 10**12
    largest = max(certain(one) for one in of.workers if bool(one.gpus) == bool(gpus))
    assert not of.refusal(Room(device, largest, plenty))
    refusal = of.refusal(Room(device, needed - 1, plenty))
    assert f"on its {device}" in refusal and "for AdamW" in refusal and "learner.zero_stage 3" in refusal
    assert ("offload_optimiser" in refusal) == (gpus > 0)
    assert not planned(LearnerConfig()).refusal(Room("GPU", 0, 0)), "nothing is on a GPU"


@pytest.mark.parametrize(("device", "gpus"), [("GPU", 0.5), ("node", 0)])
def test_what_all_of_them_cannot_hold_together_is_refused(device: str, gpus: float) -> None:
    of = planned(LearnerConfig(gpus=gpus), teachers=TeacherConfig(gpus=gpus / 2, replicas=2))
    learner, teacher = (certain(worker(of, role)) for role in ("learner rank", "teacher"))
    there = [one for one in of.workers if bool(one.gpus) == bool(gpus)]
    together, largest = sum(one.count * certain(one) for one in there), max(certain(one) for one in there)
    assert (together > learner + 2 * teacher) == (device == "node"), "the engine that writes has no GPU"
    assert together >= learner + 2 * teacher
    assert not of.refusal(Room(device, largest, together))
    assert "1 x learner rank" in of.refusal(Room(device, together, together - 1)), "each alone would fit"


def test_what_is_offloaded_lies_on_the_node() -> None:
    others = {"teachers": TeacherConfig(gpus=1), "rollout": RolloutConfig(gpus=1)}
    of = planned(LearnerConfig(gpus=1, ranks=2, offload_optimiser=True), **others)
    states = 12 * Size.of(config(llama())).learned
    refusal = of.refusal(Room("node", states // 2 - 1, 10**9))
    assert "a learner rank" in refusal and "for AdamW" in refusal
    assert "2 x learner rank" in of.refusal(Room("node", 10**9, states - 1))


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


# --- how long it takes --------------------------------------------------------------------------------------------------------

SLOW = Rates(flops=1e9 / REACHED, bytes=1e9 / REACHED)
"""A gigaflop and a gigabyte a second are reached."""
SMALL_MODEL = Size(parameters=1000, learned=1000, width=4, layers=1, computed=500)
LARGE_MODEL = Size(parameters=3000, learned=3000, width=8, layers=1, computed=2000)
FORWARD = 2 * 500 * 16 + 2 * VOCAB * 4 * 8, 2 * 2000 * 16 + 2 * VOCAB * 8 * 8
"""Flops of theirs with a prompt and a response of 8 tokens: 2 n 16 + 2 V h 8."""


@pytest.mark.parametrize(
    "shape", [config(llama()), GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=300)], ids=["llama", "gpt2"]
)
def test_a_forward_pass_takes_the_products_that_pytorch_counts(shape: PreTrainedConfig) -> None:
    size, model = Size.of(shape), AutoModelForCausalLM.from_config(shape)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 8, dtype=torch.long))
    predicted = 2 * 8 * 2 * (size.computed + shape.vocab_size * size.width)
    assert counter.get_total_flops() == pytest.approx(predicted, rel=0.05), "attention to eight tokens is next to nothing"


def test_a_step_takes_what_its_formula_says() -> None:
    student, teacher = FORWARD
    models: Any = {"student": SMALL_MODEL, "teacher": LARGE_MODEL}
    on_policy = load(Stage(algorithm=GKD(divergence=ReverseKL(), student_share=1.0), steps=1, batch_size=4), **models)
    assert on_policy.student_writes == (4 * student, 8 * 2 * 1000) and on_policy.teacher_writes == (0, 0)
    assert on_policy.scoring == (4 * teacher, 0)
    assert on_policy.learning == (4 * (3 * student + 2 * VOCAB * 8 * 8), 0)
    fine_tuning = load(Stage(algorithm=SFT(), steps=1, batch_size=4), **models)
    assert fine_tuning.learning == (4 * 3 * student, 0) and not any([*fine_tuning.scoring, *fine_tuning.student_writes])
    again = LearnerConfig(activation_checkpointing=True, ranks=2)
    assert load(Stage(algorithm=SFT(), steps=1, batch_size=4), learner=again, **models).learning == (
        2 * (3 * student + 2 * 500 * 16),
        0,
    )


def test_mixed_responses_are_read_by_both_engines_and_written_in_turns() -> None:
    mixes = MiniLLM(text_coefficient=0, teacher_share=0.25, rollouts=256)
    stage = Stage(algorithm=mixes, steps=1, batch_size=64)
    engine = EngineConfig(max_sequences=64)
    two = {"rollout": RolloutConfig(replicas=2, engine=engine), "teachers": TeacherConfig(replicas=2, engine=engine)}
    both = load(stage, student=SMALL_MODEL, teacher=LARGE_MODEL, **two)
    student, teacher = FORWARD
    steps = stage.steps_per_phase
    assert both.student_writes == pytest.approx((128 * student / steps, 2 * 0.75 * 8 * 2 * 1000 / steps))
    assert both.teacher_writes == pytest.approx((128 * teacher / steps, 2 * 0.25 * 8 * 2 * 3000 / steps))
    assert both.scoring == pytest.approx((128 * teacher / steps, 0))


def test_lanes_that_overlap_take_as_long_as_the_slowest() -> None:
    parts: Any = {"student_writes": Work(1e9), "teacher_writes": Work(0, 2e9), "scoring": Work(3e9), "learning": Work(4.5e9, 1e9)}
    in_turn, ahead = (Workload(**parts, overlapping=overlapping).seconds(SLOW) for overlapping in (False, True))
    assert in_turn == pytest.approx({"step": 10.5, "writing": 3, "scoring": 3, "learning": 4.5})
    assert ahead["step"] == pytest.approx(5), "the teacher's, which writes and scores"


def test_a_plan_for_a_kind_of_gpu_says_how_long() -> None:
    one_each: Any = {"rollout": RolloutConfig(gpus=1), "teachers": TeacherConfig(gpus=1)}
    stage = Stage(algorithm=GKD(divergence=ReverseKL(), student_share=1.0), steps=1000, batch_size=16, max_staleness=1)
    asked = experiment(LearnerConfig(gpus=1), stages=(stage,), **one_each)
    *_, said = plan(asked, text_tokenizer(), VOCAB, "H100").notes
    assert said.startswith("stages.0: about ") and "at the same time" in said and "GPU hours for 1,000 steps" in said
    with pytest.raises(ValueError, match="choose from L4, L40S, A100"):
        plan(asked, text_tokenizer(), VOCAB, "K80")
    with pytest.raises(ValueError, match=r"on GPUs, learner\.gpus, teachers\.gpus, rollout\.gpus ask for none"):
        plan(experiment(LearnerConfig()), text_tokenizer(), VOCAB, "H100")
    shared = experiment(
        LearnerConfig(gpus=0.4), stages=(stage,), rollout=RolloutConfig(gpus=0.3), teachers=TeacherConfig(gpus=0.3)
    )
    assert not workload(shared, stage, SMALL_MODEL, LARGE_MODEL, VOCAB).overlapping, "one GPU does one thing after the other"


def test_the_measured_rates_lie_around_the_one_that_is_planned_with() -> None:
    """benchmarks/gpu_13b.py on an H200: 0.520 s to score, 0.420 s to learn from 16 texts of 256 + 512 tokens."""
    student, teacher = (
        Size.of(config(llama(hidden_size=w, intermediate_size=i, num_hidden_layers=n, num_attention_heads=h, vocab_size=32_000)))
        for w, i, n, h in ((2048, 5504, 24, 16), (5120, 13824, 40, 40))
    )
    stage = Stage(algorithm=GKD(divergence=ReverseKL(), student_share=1.0), steps=1, batch_size=16)
    asked = experiment(LearnerConfig(), stages=(stage,), max_prompt=256, max_response=512)
    seconds = workload(asked, stage, student, teacher, 32_000).seconds(RATES["H200"])
    assert seconds["learning"] < 0.420 and seconds["scoring"] > 0.520
    assert seconds["learning"] + seconds["scoring"] == pytest.approx(0.520 + 0.420, rel=0.2)
