"""The actors of a run, started: all of them, or an error that says what is missing."""

from itertools import chain
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raykd.actors import LearnerActor, ModelFacts, RewardActor, RolloutActor, TeacherActor
from raykd.experiment import Experiment
from raykd.fleet import START_DEADLINE_S, Fleet, LearnerGang, Placement, get
from raykd.replay import ReplayBuffer
from raykd.usage import Usage
from raykd.workers import Workers


def start_workers(experiment: Experiment, facts: ModelFacts) -> Workers:
    """Returns once engines and ranks have loaded their models: every start-up error surfaces here, with its reason."""
    rollout, teachers, learner, reward = experiment.rollout, experiment.teachers, experiment.learner, experiment.reward
    restarts = experiment.restarts
    placement = Placement(
        [learner.gpus] * learner.ranks + [teachers.gpus] * experiment.num_teachers + [rollout.gpus] * experiment.num_rollouts,
        crowded=experiment.threads() > ray.cluster_resources().get("CPU", 0),
    )
    create = placement.create
    ranks = [create(LearnerActor, learner, facts, r, gpus=learner.gpus, threads=learner.threads) for r in range(learner.ranks)]
    scores: Any = {"gpus": teachers.gpus, "threads": teachers.threads, "starts_vllm": experiment.teacher_starts_vllm}
    scorers = [
        create(TeacherActor, teachers, facts, experiment.teacher_writes, restarts=restarts, **scores)
        for _ in range(experiment.num_teachers)
    ]
    writes: Any = {"gpus": rollout.gpus, "threads": rollout.engine.threads, "starts_vllm": True}
    writers = [create(RolloutActor, rollout, facts, restarts=restarts, **writes) for _ in range(experiment.num_rollouts)]
    raters = [create(RewardActor, reward, facts, gpus=0, threads=1, restarts=restarts)] if reward else []
    scoring = Fleet("teacher", scorers, teachers.engine.deadline_s) if scorers else None
    writing = Fleet("rollout", writers, rollout.engine.deadline_s) if writers else None
    sleeping = (writing, rollout.sleep), (scoring, teachers.sleep and experiment.teacher_writes)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)  # it ends with the driver's node
    lanes = {"rollout": writers, "teacher": scorers, "reward": raters, "learner": ranks}
    workers = Workers(
        learner=LearnerGang(ranks, learner.deadline_s),
        teachers=scoring,
        rollouts=writing,
        rater=Fleet("reward", raters, reward.deadline_s) if reward else None,
        replay=ray.remote(ReplayBuffer).options(num_cpus=0, scheduling_strategy=here).remote(experiment.seed),
        usage=Usage([lane for lane, actors in lanes.items() if actors]),
        sleepers=[fleet for fleet, sleeps in sleeping if fleet and sleeps],
        placement=placement,
    )
    try:
        _load_models(workers, [*scorers, *writers, *raters])
    except BaseException:
        workers.close()  # what is reserved would stay so for as long as this process lives
        raise
    return workers


def _load_models(workers: Workers, replicas: list[Any]) -> None:
    """Wait for the engines while the ranks load."""
    ranks, teachers = workers.learner.ranks, workers.teachers
    get([rank.check.remote() for rank in ranks], START_DEADLINE_S, "starting the learner")
    if workers.sleepers:  # vLLM measures what is free when it starts, and the ranks load in what it gives back
        get([actor.ping.remote() for actor in replicas], START_DEADLINE_S, "starting the engines")
        workers.sleep()
    address = get(ranks[0].address.remote(), START_DEADLINE_S, "learner rank 0")
    heads = get(teachers.actors[0].head.remote(), START_DEADLINE_S, "the teacher's head") if teachers else []
    starts = [rank.start.remote(address, heads) for rank in ranks]
    get([*(actor.ping.remote() for actor in replicas), *starts], START_DEADLINE_S, "starting the workers")
    if workers.rollouts:
        choose_memory(ranks[0], workers.rollouts)


def choose_memory(rank: Any, rollouts: Fleet) -> None:
    """Weights that learner rank 0 publishes stay on its GPU where every replica is on it. Elsewhere they lie in its node's
    memory, which is shown to other nodes if there are replicas, and NIXL is installed everywhere."""

    def ask(method: str) -> Any:
        return get(getattr(rank, method).remote(), START_DEADLINE_S, "learner rank 0")

    gpus = {ask("gpu"), *chain(*rollouts.broadcast("gpus", {}))}
    if len(gpus) == 1 and None not in gpus:
        ask("publish_on_gpu")
    elif {*rollouts.broadcast("ping", {})} != {ask("node")} and all(rollouts.broadcast("reads_other_nodes", {})):
        ask("publish_between_nodes")
