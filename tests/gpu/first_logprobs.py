"""What an engine on the GPU thinks of the first tokens behind prompts, to compare it with another one's."""

import torch

from llm.config import EngineConfig
from llm.models.decoder import DecoderModel
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest


def logprobs(model: DecoderModel, lens: list[int], backend: str | None = None, **config) -> torch.Tensor:
    """Of the first tokens after prompts of these lengths and one token of output: by prefill, then by decode."""
    generator = torch.Generator().manual_seed(1)
    defaults = {"max_batch_size": 64, "max_seq_len": 4096, "num_pages": 1200}
    engine = ContinuousBatchingEngine(model, config=EngineConfig(attention_backend=backend, **{**defaults, **config}))
    requests = [
        GenerationRequest(
            prompt_token_ids=tuple(torch.randint(0, 4000, (n,), generator=generator).tolist()), output_token_ids=(7,),
            max_new_tokens=2, temperature=0.0, ignore_eos=True, logprobs=0,
        )
        for n in lens
    ]  # fmt: skip
    results = engine.generate(requests, progress=False)
    return torch.tensor([result.logprobs[0].logprob for result in results])
