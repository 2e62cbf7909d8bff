"""A replica whose model two processes hold, through HTTP: the text of one process, with adapters that requests choose
and without, and none left when it stops."""

from itertools import product
from pathlib import Path

from in_process import DEMO, LocalClient, Service, end_service, eventually
from small_adapters import write_adapter

from deployments.config import AppConfig
from deployments.replica.engine_replica import EngineReplica

QUESTIONS = ["What is 4 + 7?", "Spell banana backwards.", "Count from 3 to 9."]


async def answers_of(num_ranks: int, folder: Path) -> tuple[list[str], list[int]]:
    """The text of each answer, and the processes beside this one."""
    engine = {"tensor_parallel_size": num_ranks, "max_seq_len": 512, "max_adapters": 1}
    config = AppConfig(model=str(DEMO), device="cpu", dtype="float32", engine=engine, adapter_folder=str(folder))
    replica = EngineReplica(config, "replica-0")
    service = Service(config, LocalClient([replica]))
    await service.router.wait_until_ready()
    await eventually(lambda: service.directory.adapters.is_settled)
    texts = []
    for question, model in product(QUESTIONS, ("demo", "one", "two")):
        messages = [{"role": "user", "content": question}]
        body = {"model": model, "temperature": 0, "max_tokens": 24}
        reply = await service.post("/v1/chat/completions", messages=messages, **body)
        assert reply.status_code == 200, reply.text
        texts.append(reply.json()["choices"][0]["message"]["content"])
    pids = replica._loop._engine.rank_process_ids
    del replica
    await end_service(service)
    return texts, pids


async def test_text_of_two_ranks_is_that_of_one(tmp_path: Path):
    write_adapter(tmp_path / "one", seed=1, rank=4)
    write_adapter(tmp_path / "two", seed=2, rank=8)
    alone, nobody = await answers_of(1, tmp_path)
    together, pids = await answers_of(2, tmp_path)
    assert len(set(alone)) > 2 * len(QUESTIONS), "adapters change the text"
    assert together == alone
    assert (len(nobody), len(pids)) == (0, 1)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
