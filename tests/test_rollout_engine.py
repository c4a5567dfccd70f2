import asyncio
from dataclasses import replace
from itertools import zip_longest

import pytest
import torch
from rollout_stack import (
    STORIES,
    STORIES_EOS,
    TINY_ROWS,
    TINY_VOCABULARY,
    chosen_logprobs,
    folder,
    new_engine,
    perturbed,
    publish,
    reference,
    wait,
    worker,
)

from raykd.records import Source
from raykd.rollout.requests import GenerationRequest, derive_seed
from raykd.rollout.vllm_engine import AT_ONCE, VllmEngine
from raykd.weights import Shelves, WeightUpdate

pytestmark = [pytest.mark.stack, pytest.mark.usefixtures("data")]

PROMPTS = [(1, 403, 407, 261, 378), (1, 410, 412, 432, 411, 347, 328, 369), (1, 320)]


def requests(salt: int = 0, samples: int = 3) -> list[GenerationRequest]:
    return [
        GenerationRequest(prompt_id=f"p{index}", sample=sample, prompt_tokens=prompt, salt=salt)
        for index, prompt in enumerate(PROMPTS)
        for sample in range(samples)
    ]


def greedy(engine: VllmEngine, prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    return wait(engine.complete(prompt, max_tokens, seed=0, temperature=0.0)).tokens


def reference_greedy(model, prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    written = model.generate(torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False, eos_token_id=STORIES_EOS)
    return tuple(written[0, len(prompt) :].tolist())


def same_bytes(engine: VllmEngine, model) -> list[str]:
    """Names of the tensors that vLLM keeps as they are published (embedding and norms; linear weights are repacked)."""
    published = dict(model.named_parameters())

    def compare(vllm_model) -> list[str]:
        kept = {name: tensor for name, tensor in vllm_model.named_parameters() if name in published}
        return [
            name
            for name, tensor in kept.items()
            if tensor.shape == published[name].shape and torch.equal(tensor, published[name])
        ]

    return wait(engine.inspect(lambda engine: engine.apply_model(compare)))[0]


@pytest.mark.parametrize("model", [STORIES, "teacher"])
def test_logprobs_of_what_it_writes_are_those_of_hugging_face(model):
    model = model if model == STORIES else folder(model)
    for rollout in wait(worker(model).generate(requests(), teacher_share=0.0, max_tokens=100)):
        expected = chosen_logprobs(reference(model), [*rollout.prompt_tokens, *rollout.tokens], len(rollout.prompt_tokens))
        torch.testing.assert_close(torch.tensor(rollout.student_logprobs), expected, atol=1e-4, rtol=0)
        assert rollout.source is Source.STUDENT


def test_greedy_tokens_are_those_of_hugging_face():
    for prompt in PROMPTS:
        assert greedy(worker(STORIES).engine, prompt, 60) == reference_greedy(reference(STORIES), prompt, 60)


@pytest.mark.parametrize("start", [1, 3, 200, 254, 255])
def test_a_text_of_full_length_is_scored_from_any_position(start):
    tokens = torch.randint(3, 512, (256,), generator=torch.Generator().manual_seed(0)).tolist()
    scored = wait(worker(STORIES).engine.complete(tokens, 0, seed=0, session="scored", score_from=start)).scored
    torch.testing.assert_close(torch.tensor(scored), chosen_logprobs(reference(STORIES), tokens, start), atol=1e-4, rtol=0)
    wait(worker(STORIES).engine.forget("scored"))


TEXT = torch.randint(3, 512, (200,), generator=torch.Generator().manual_seed(3)).tolist()


async def continued(engine: VllmEngine, session: str, known: int, scored: int, max_tokens: int) -> None:
    """Writes a token after the ``known`` first of ``TEXT``, and goes on once another has written ``scored`` more."""
    first = await engine.complete(TEXT[:known], 1, seed=0, session=session)
    text = [*TEXT[:known], *first.tokens, *TEXT[-scored:]]
    written = await engine.complete(text, max_tokens, seed=known, session=session, score_from=known + 1)
    await engine.forget(session)
    alone = await engine.complete(text, max_tokens, seed=known) if max_tokens else written
    assert (written.tokens, written.finished) == (alone.tokens, alone.finished)
    expected = chosen_logprobs(reference(STORIES), [*text, *written.tokens], known + 1)
    torch.testing.assert_close(torch.tensor(written.scored + written.logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
@pytest.mark.parametrize("scored", [1, 2, AT_ONCE, AT_ONCE + 1, 3 * AT_ONCE])
def test_what_others_wrote_is_scored_as_it_is_read(scored, max_tokens):
    engine, pieces = worker(STORIES).engine, []

    def watch(vllm):
        add = vllm.engine_core.add_request
        vllm.engine_core.add_request = lambda request: pieces.append(request.request_id) or add(request)

    wait(engine.inspect(watch))
    wait(continued(engine, "read", 20, scored, max_tokens))
    wait(engine.inspect(lambda vllm: delattr(vllm.engine_core, "add_request")))
    at_once = min(scored, AT_ONCE if max_tokens else AT_ONCE + 1)
    assert sum("read" in piece for piece in pieces) == 1 + scored - at_once + 1
    assert wait(engine.inspect(scores_left)) == 0


def scores_left(vllm) -> int:
    (sampler,) = vllm.collective_rpc(lambda worker: worker.model_runner.sampler)
    return len(sampler.scores)


def test_scores_are_those_of_each_text_when_a_step_takes_only_parts_of_some():
    engine = worker(STORIES).engine
    step = wait(engine.inspect(lambda vllm: vllm.vllm_config.scheduler_config.max_num_batched_tokens))

    async def all_at_once():
        others = (engine.complete(TEXT[index % 9 :], 3, index) for index in range(step // 190 + 8))
        sessions = (continued(engine, f"s{index}", 5 + 3 * index, 1 + index % 12, 4) for index in range(40))
        await asyncio.gather(*(one for both in zip_longest(others, sessions) for one in both if one is not None))

    wait(all_at_once())
    assert wait(engine.inspect(scores_left)) == 0


def test_what_was_not_read_because_it_was_cached_is_scored_piece_by_piece():
    engine = worker(STORIES).engine
    sessions = engine._thread._sessions
    sessions._scores, kept = {}, sessions._scores  # as if none of the places had been computed
    wait(continued(engine, "cached", 20, 3, 4))
    sessions._scores = kept
    wait(engine.inspect(forget_scores))


def forget_scores(vllm) -> None:
    vllm.collective_rpc(lambda worker: worker.model_runner.sampler.scores.clear())


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_response_depends_on_its_own_seed_and_not_on_its_batch(share):
    student, teacher = worker(STORIES), worker(folder("teacher")).engine
    together = wait(student.generate(requests(), share, 40, teacher))
    backwards = wait(student.generate(requests()[::-1], share, 40, teacher))[::-1]
    alone = [wait(student.generate([request], share, 40, teacher))[0] for request in requests()]
    assert [r.tokens for r in together] == [r.tokens for r in backwards] == [r.tokens for r in alone]
    assert len({r.tokens for r in together}) == len(together), "samples of a prompt differ"
    assert [r.tokens for r in wait(student.generate(requests(salt=1), share, 40, teacher))] != [r.tokens for r in together]


def test_more_prompt_tokens_than_one_step_takes_are_written_as_if_alone():
    engine = worker(STORIES).engine
    long, step = tuple(range(3, 203)), wait(engine.inspect(lambda vllm: vllm.vllm_config.scheduler_config.max_num_batched_tokens))

    async def all_at_once():
        return await asyncio.gather(*(engine.complete(long[seed % 7 :], 2, seed) for seed in range(step // 190 + 8)))

    together = wait(all_at_once())
    for seed in (0, len(together) - 1):
        assert together[seed].tokens == wait(engine.complete(long[seed % 7 :], 2, seed)).tokens


def test_tokens_are_drawn_from_the_whole_softmax():
    from raykd.rollout.cpu_sampler import BLOCK, draw, exponentiate_  # needs vLLM, which only some tests start

    for vocab_size in (BLOCK - 7, 2 * BLOCK, 3 * BLOCK + 5):
        logits = 3 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(0))
        logits[[7, -1]] = -torch.inf
        law = logits.double().softmax(-1)
        middles = law.cumsum(-1) - law / 2
        likely = law > 1e-6
        largest, weights = exponentiate_(logits[None].clone())
        drawn, sums = draw(weights.expand(int(likely.sum()), -1), middles[likely])
        assert drawn.tolist() == likely.nonzero()[:, 0].tolist()
        torch.testing.assert_close((largest + sums.log())[:, 0], logits.logsumexp(-1).expand(len(drawn)))
        ends, _ = draw(weights.expand(2, -1), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
        assert (law[ends] > 0).all()


def test_seeds_are_the_same_in_every_process():
    assert derive_seed(0, 1, "train.jsonl:17", 0, 3) == 8044038525178304390  # of another process
    assert derive_seed(0, 11) != derive_seed(0, 1, 1)


@pytest.mark.parametrize("model", [STORIES, "teacher"], ids=["tied head", "own head"])
def test_loaded_weights_take_effect_exactly_and_at_once(model):
    model = model if model == STORIES else folder(model)
    student, changed = worker(model), perturbed(reference(model), seed=5)
    before = [greedy(student.engine, prompt, 40) for prompt in PROMPTS]
    expected_tokens = [reference_greedy(changed, prompt, 40) for prompt in PROMPTS]
    try:
        assert wait(student.load(publish(changed, version=7))) == 7
        assert [greedy(student.engine, prompt, 40) for prompt in PROMPTS] == expected_tokens != before
        for rollout in wait(student.generate(requests(), 0.0, 60)):
            expected = chosen_logprobs(changed, [*rollout.prompt_tokens, *rollout.tokens], len(rollout.prompt_tokens))
            torch.testing.assert_close(torch.tensor(rollout.student_logprobs), expected, atol=1e-4, rtol=0)
            assert rollout.version == 7
        assert wait(student.load(publish(perturbed(changed, seed=4), version=8))) == 8
        assert [greedy(student.engine, prompt, 40) for prompt in PROMPTS] != expected_tokens
        assert wait(student.load(publish(changed, version=9))) == 9, "in place, as the one before"
        assert [greedy(student.engine, prompt, 40) for prompt in PROMPTS] == expected_tokens
        layers = range(reference(model).config.num_hidden_layers)
        norms = {f"model.layers.{i}.{name}_layernorm.weight" for i in layers for name in ("input", "post_attention")}
        assert {"model.embed_tokens.weight", "model.norm.weight", *norms} <= set(same_bytes(student.engine, changed))
    finally:
        wait(student.load(publish(reference(model), version=0)))
    assert [greedy(student.engine, prompt, 40) for prompt in PROMPTS] == before


@pytest.mark.parametrize("model", [STORIES, "teacher", "tiny-q", "gpt2", "qwen2"])
def test_after_the_first_update_weights_are_copied_in_place_and_nothing_is_missed(model):
    model = model if model == STORIES else folder(model)
    engine, changed = worker(model).engine, perturbed(reference(model), seed=11)
    for version, published in enumerate((changed, reference(model)), start=1):
        wait(engine.load(publish(published, version)))

    def in_place(vllm) -> list[str]:
        plan = vllm.model_executor.driver_worker.worker.weight_transfer_engine.plan
        return sorted(plan._writes)

    assert wait(engine.inspect(in_place)) == sorted(name for name, _ in changed.named_parameters())
    for model_now in (changed, reference(model)):
        wait(engine.load(publish(model_now, version=3)))
        for completion in wait(_many(engine, 8)):
            expected = chosen_logprobs(model_now, [1, *completion.tokens], 1)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


def test_a_tensor_that_the_loader_makes_itself_is_not_missed_by_a_plan():
    """As vLLM does with the bias of some heads."""
    from raykd.rollout.load_plan import LoadPlan, Recorder

    published = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    for late in (False, True):
        layer = torch.nn.Linear(3, 2, bias=not late)
        recorder = Recorder(layer)
        if late:
            layer.bias = torch.nn.Parameter(torch.empty(2))
        with torch.no_grad(), recorder:
            for name, tensor in recorder.watched(list(published.items())):
                getattr(layer, name).copy_(tensor)
        if late:
            with pytest.raises(NotImplementedError, match="puts bias into a tensor that it makes itself"):
                LoadPlan(layer, recorder, torch.float32)
        else:
            assert LoadPlan(layer, recorder, torch.float32).missing({"weight"}) == ["bias"]


def test_a_damaged_bucket_is_refused_before_any_weight_changes():
    student, update = worker(STORIES), publish(perturbed(reference(STORIES), seed=6), version=9)
    before = greedy(student.engine, PROMPTS[0], 30)
    data = update.buckets[-1].data.copy()
    data[update.buckets[-1].tensors[0].start + 3] ^= 1
    damaged = replace(update.buckets[-1], place=data)
    with pytest.raises(ValueError, match="damaged"):
        wait(student.load(replace(update, buckets=(*update.buckets[:-1], damaged))))
    assert greedy(student.engine, PROMPTS[0], 30) == before
    assert student.version == 0


def test_responses_in_progress_are_finished_by_the_version_that_began_them():
    student, changed = worker(STORIES), perturbed(reference(STORIES), seed=7)

    async def load_meanwhile():
        writing = asyncio.ensure_future(student.generate(requests(), 0.0, 100))
        await asyncio.sleep(0.05)
        loading = asyncio.ensure_future(student.load(publish(changed, version=3)))
        while not (student._loading or loading.done()):  # fetching takes as long as it takes
            await asyncio.sleep(0.001)
        later = asyncio.ensure_future(student.generate(requests(), 0.0, 100))
        return await writing, await loading, await later

    try:
        first, version, second = wait(load_meanwhile())
    finally:
        wait(student.load(publish(reference(STORIES), version=0)))
    assert (version, {r.version for r in first}, {r.version for r in second}) == (3, {0}, {3})
    for rollouts, model in ((first, reference(STORIES)), (second, changed)):
        for rollout in rollouts:
            expected = chosen_logprobs(model, [*rollout.prompt_tokens, *rollout.tokens], len(rollout.prompt_tokens))
            torch.testing.assert_close(torch.tensor(rollout.student_logprobs), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def switched_logprobs(before, after, tokens: tuple[int, ...], start: int, at: int) -> torch.Tensor:
    """Of ``tokens[start:]`` where ``before`` reads the text up to position ``at``, and ``after`` the rest with its keys and
    values; ``[T]``."""
    read = before(torch.tensor([tokens[:at]]), use_cache=True)
    rest = after(torch.tensor([tokens[at:]]), past_key_values=read.past_key_values)
    logprobs = torch.cat([read.logits, rest.logits], 1)[0, start - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(tokens[start:])[:, None])[:, 0]


@pytest.mark.parametrize("teacher_share", [0.0, 0.3])
def test_in_flight_new_weights_write_on_with_the_keys_and_values_that_are_there(teacher_share):
    """The first update is vLLM's own, the second in place. A later request for the same prompt finds nothing cached."""
    student, models = worker(STORIES), [reference(STORIES)]
    long = GenerationRequest(prompt_id="long", sample=0, prompt_tokens=(1, *range(300, 370)), salt=0)  # two blocks and more
    asked = [*requests(), long]

    async def load_meanwhile(update):
        writing = asyncio.ensure_future(student.generate(asked, teacher_share, 120, worker(folder("teacher")).engine))
        while not student.engine._thread._running:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        version = await student.load(update, in_flight=True)
        assert not writing.done(), "all was written before the new weights came"
        return await writing, version, await student.generate([long], 0.0, 20)

    try:
        for version in (1, 2):
            models.append(perturbed(models[-1], seed=20 + version))
            rollouts, loaded, later = wait(load_meanwhile(publish(models[-1], version)))
            assert (loaded, {r.version for r in rollouts}, later[0].version) == (version, {version - 1}, version)
            num_switched = 0
            for rollout in rollouts:
                tokens, start = (*rollout.prompt_tokens, *rollout.tokens), len(rollout.prompt_tokens)
                recorded = torch.tensor(rollout.student_logprobs)
                differ = [(chosen_logprobs(model, tokens, start) - recorded).abs() > 1e-4 for model in models[-2:]]
                if all(differs.any() for differs in differ):  # what the new weights are sure of, the old ones may be, too
                    first = start + int(differ[0].nonzero()[0])
                    before, after = models[-2:]
                    places = range(max(1, first - 10), first)
                    switched = [switched_logprobs(before, after, tokens, start, at) for at in places]
                    assert min(float((expected - recorded).abs().max()) for expected in switched) < 1e-4
                    num_switched += 1
            assert num_switched >= len(rollouts) // 2, "most were written by both"
            expected = chosen_logprobs(models[-1], [*long.prompt_tokens, *later[0].tokens], len(long.prompt_tokens))
            torch.testing.assert_close(torch.tensor(later[0].student_logprobs), expected, atol=1e-4, rtol=0)
    finally:
        wait(student.load(publish(reference(STORIES), version=0)))


def test_padding_of_the_vocabulary_is_never_sampled_and_has_no_probability():
    model = folder("tiny-q")
    written = wait(_many(worker(model).engine, 64))
    assert {token for completion in written for token in completion.tokens} <= set(range(TINY_VOCABULARY))
    assert reference(model).config.vocab_size == TINY_ROWS
    for completion in written:
        expected = chosen_logprobs(reference(model), [1, *completion.tokens], 1)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


async def _many(engine: VllmEngine, count: int):
    return await asyncio.gather(*(engine.complete([1], 20, seed=seed) for seed in range(count)))


def test_what_cannot_be_answered_is_refused_with_a_remedy():
    engine = worker(STORIES).engine
    with pytest.raises(ValueError, match=r"257 tokens .* exceed max_length 256"):
        wait(engine.complete([1] * 57, 200, seed=0))
    with pytest.raises(ValueError, match=r"within \[0, 512\)"):
        wait(engine.complete([1, 512], 10, seed=0))
    with pytest.raises(ValueError, match="token before it"):
        wait(engine.complete([1, 2], 0, seed=0, session="scored", score_from=0))
    with pytest.raises(ValueError, match="nothing is asked"):
        wait(engine.complete([1, 2], 0, seed=0, session="scored", score_from=2))
    with pytest.raises(ValueError, match="no teacher was given"):
        wait(worker(STORIES).generate(requests(), 0.2, 10))
    with pytest.raises(ValueError, match="more than the 512 rows"):
        new_engine(STORIES, vocab_size=600)


# Last: an engine that ends takes the process groups with it that vLLM shares among the engines of a process.


def test_an_incomplete_update_stops_the_engine_and_every_caller_learns_why():
    engine, update = new_engine(folder("tiny-q")), publish(reference(folder("tiny-q")), version=1)

    async def load_and_complete():
        partial = WeightUpdate(version=1, buckets=update.buckets[:1], bytes=0)
        loading = asyncio.ensure_future(engine.install(partial))
        await asyncio.sleep(0)  # it has its place in the queue now
        return await asyncio.gather(loading, engine.complete([1, 2], 8, seed=0), return_exceptions=True)

    assert len(update.buckets) > 1, "one bucket would be a complete update"
    loading, waiting = wait(load_and_complete())
    assert isinstance(loading, ValueError) and "misses values of" in str(loading)
    assert isinstance(waiting, RuntimeError) and "misses values of" in str(waiting)
    with pytest.raises(RuntimeError, match="start a new one"):
        wait(engine.complete([1, 2], 8, seed=0))
    engine.close()


def test_an_incomplete_or_misshapen_update_in_place_stops_the_engine_too():
    for wrong in ("missing", "misshapen"):
        engine, update = new_engine(folder("tiny-q")), publish(reference(folder("tiny-q")), version=1)
        wait(engine.load(update))
        last = update.buckets[-1].tensors[-1]
        if wrong == "missing":
            buckets = (*update.buckets[:-1], replace(update.buckets[-1], tensors=update.buckets[-1].tensors[:-1]))
        else:
            shorter = replace(last, shape=(last.shape[0] // 2, *last.shape[1:]))
            buckets = (*update.buckets[:-1], replace(update.buckets[-1], tensors=(*update.buckets[-1].tensors[:-1], shorter)))
        with pytest.raises(ValueError, match="misses values of 1" if wrong == "missing" else "unlike in the first update"):
            wait(engine.load(replace(update, buckets=buckets)))
        with pytest.raises(RuntimeError, match="has stopped"):
            wait(engine.complete([1, 2], 8, seed=0))
        engine.close()


def test_weights_written_over_while_they_are_installed_stop_the_engine():
    engine, shelves, model = new_engine(folder("tiny-q")), Shelves(), reference(folder("tiny-q"))
    stale = publish(model, version=1, shelves=shelves)
    wait(engine.load(stale))
    publish(model, version=2, shelves=shelves)
    with pytest.raises(ValueError, match="gave way to publish 2; hold an update"):
        wait(engine.load(stale))
    assert wait(engine.complete([1, 2], 8, seed=0)).tokens, "it was found out before anything changed"
    with pytest.raises(ValueError, match="gave way to publish 2; hold an update"):
        wait(engine.install(stale))
    with pytest.raises(RuntimeError, match="has stopped"):
        wait(engine.complete([1, 2], 8, seed=0))
    engine.close()


def test_a_late_answer_is_an_error_and_frees_its_place():
    engine = new_engine(folder("tiny-q"), deadline_s=1e-4)
    with pytest.raises(TimeoutError, match="raise deadline_s"):
        wait(engine.complete([1, 2], 200, seed=0))
    assert engine._thread.exclusive(lambda vllm: vllm.get_num_unfinished_requests()).result(timeout=60) == 0
    engine.close()


def test_texts_at_rest_give_way_to_one_that_needs_more_memory_than_is_free():
    """Two texts hold 10 of 14 blocks, fewer than are crowded, and a third needs 7."""
    engine = new_engine(folder("tiny-q"), cpu_cache_gib=15 * 2**14 / 2**30, deadline_s=60.0)
    blocks = engine._thread._sessions._scheduler.kv_cache_config.num_blocks
    for first, length in ((1, 150), (2, 150), (3, 210), (1, 160)):
        response = wait(engine.complete([first, *[2, 3, 4] * 100][:length], 2, 0, session=str(first)))
        assert len(response.tokens) == 2 or response.finished
    assert blocks == 15
    engine.close()
