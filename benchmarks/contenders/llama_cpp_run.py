"""llama.cpp through llama-cpp-python: bf16 GGUF, memory-mapped, fed token ids, greedy.

Uses the low-level binding, because the high-level one evaluates one sequence at a time.
"""

import os

import llama_cpp
import numpy as np

from .protocol import Job, TokenClock, parse_job


class LlamaSession:
    """A model, a context and a batch of llama.cpp, released by `close`."""

    def __init__(self, job: Job) -> None:
        """Map the GGUF of `job`; RuntimeError when llama.cpp refuses it."""
        threads = len(os.sched_getaffinity(0))
        model_params = llama_cpp.llama_model_default_params()
        model_params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
        self._model = llama_cpp.llama_model_load_from_file(str(job.gguf).encode(), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp could not load {job.gguf}; its messages are above")
        token_count = job.batch * (job.prompt_length + job.new_tokens)
        context_params = llama_cpp.llama_context_default_params()
        context_params.n_ctx = token_count
        context_params.n_batch = context_params.n_ubatch = job.batch * job.prompt_length
        context_params.n_seq_max = job.batch
        context_params.kv_unified = True  # else n_ctx is split, and rounded, per sequence
        context_params.n_threads = context_params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, context_params)
        if not self._context:
            raise RuntimeError(f"llama.cpp could not make a context of {token_count} tokens; its messages are above")
        self._batch = llama_cpp.llama_batch_init(context_params.n_batch, 0, 1)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def next_tokens(self, rows: list[list[int]], position: int) -> list[int]:
        """Append `rows` (one list of ids per sequence, equally long) at `position`; each sequence's best next id."""
        last_of_row = []
        slot = 0
        for sequence, row in enumerate(rows):
            for index, token in enumerate(row):
                self._batch.token[slot] = token
                self._batch.pos[slot] = position + index
                self._batch.n_seq_id[slot] = 1
                self._batch.seq_id[slot][0] = sequence
                self._batch.logits[slot] = index == len(row) - 1
                slot += 1
            last_of_row.append(slot - 1)
        self._batch.n_tokens = slot
        status = llama_cpp.llama_decode(self._context, self._batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status} for {slot} tokens at position {position}")
        return [self._best(slot) for slot in last_of_row]

    def _best(self, slot: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, slot)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(self._vocab_size,))))

    def close(self) -> None:
        """Free batch, context and model."""
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)


def main() -> None:
    """Run the job on the command line."""
    clock = TokenClock()
    job = parse_job()
    llama_cpp.llama_backend_init()
    session = LlamaSession(job)
    clock.mark_loaded()
    rows = job.prompts()
    position = 0
    tokens: list[list[int]] = [[] for _ in rows]
    for _ in range(job.new_tokens):
        best = session.next_tokens(rows, position)
        clock.mark_token()
        position += len(rows[0])
        rows = [[token] for token in best]
        for row, token in zip(tokens, best, strict=True):
            row.append(token)
    session.close()
    clock.report(tokens, {"llama-cpp-python": llama_cpp.__version__})


if __name__ == "__main__":
    main()
