"""penstock: the checkpoint streams through whatever budget the cgroup leaves."""

from importlib.metadata import version

import torch
import transformers
import transformers.models.llama.modeling_llama  # loading imports it late; imports do not count
from transformers import PreTrainedModel

import penstock
from penstock.api import load as load_streamed  # the package imports it late

from .protocol import TokenClock, parse_job, run_transformers


def main() -> None:
    """Run the job on the command line."""
    clock = TokenClock()
    job = parse_job()
    loaded: list[PreTrainedModel] = []

    def load() -> PreTrainedModel:
        context = job.prompt_length + job.new_tokens
        model = load_streamed(job.checkpoint, max_memory="auto", device="cpu", context=context, batch=job.batch)
        loaded.append(model)
        return model

    tokens = run_transformers(job, clock, load)
    notes = str(penstock.explain(loaded[0]))
    penstock.close(loaded[0])
    versions = {
        "penstock": version("penstock"),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    clock.report(tokens, versions, notes=notes)


if __name__ == "__main__":
    main()
