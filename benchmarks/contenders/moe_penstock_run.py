"""penstock: experts are read when a router asks for them, and kept as its cache says."""

from importlib.metadata import version

import torch
import transformers
import transformers.models.qwen3_moe.modeling_qwen3_moe  # loading imports it late; imports do not count

import penstock
from penstock.api import load as load_streamed  # the package imports it late

from .moe import parse_moe_job, run_text
from .protocol import TokenClock


def main() -> None:
    """Run the job on the command line."""
    clock = TokenClock()
    job = parse_moe_job()
    context = job.prompt_length + job.new_tokens
    model = load_streamed(job.checkpoint, max_memory="auto", device="cpu", context=context, batch=1)
    handle = model.penstock
    clock.mark_loaded()
    prompt = []

    def step() -> None:
        clock.mark_token()
        if not prompt:
            prompt.append(handle.statistics())

    tokens = run_text(job, model, step)
    figures = {}
    after, before = handle.statistics(), prompt[0]
    if after.experts is not None:
        decode, early = after.experts.decode, before.experts.decode  # a short prompt counts as decoding
        figures = {
            "uses": decode.uses - early.uses,
            "misses": sum(decode.misses.values()) - sum(early.misses.values()),
            "prefetched": decode.hits["prefetched"] - early.hits["prefetched"],
            "capacity": after.experts.capacity,
            "passing": after.experts.passing,
            "expert_reads_nbytes": decode.read_nbytes - early.read_nbytes,
            "other_reads_nbytes": after.disk_read_nbytes
            - before.disk_read_nbytes
            - (decode.read_nbytes - early.read_nbytes),
            **{f"hits_{cause}": count - early.hits[cause] for cause, count in decode.hits.items()},
            **{f"misses_{cause.replace(' ', '_')}": n - early.misses[cause] for cause, n in decode.misses.items()},
        }
        ahead = after.experts.prefetching
        if ahead is not None:
            figures |= {"ahead_brought": ahead.prefetched, "ahead_used": ahead.used, "ahead_gained_s": ahead.gained_s}
    notes = str(penstock.explain(model))
    penstock.close(model)
    versions = {
        "penstock": version("penstock"),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    clock.report(tokens, versions, notes=notes, figures=figures)


if __name__ == "__main__":
    main()
