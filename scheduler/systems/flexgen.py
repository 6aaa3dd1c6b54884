"""FlexGen on one machine, or as a pipeline on several: prefill, then decode, by a policy that is given or found."""

from __future__ import annotations

from ..hardware import Hardware
from ..modelshape import ModelShape
from ..work import Work
from .flexgen_block import Block, FlexGenOptions
from .flexgen_search import fits, search
from .prediction import Pass, Prediction, generated
from .system import absurd, device, drives, only, options


class FlexGen:
    """The policy."""

    name = "flexgen"
    summary = "FlexGen: zig-zag over micro-batches, percentages on three tiers, CPU attention, 4-bit compression"

    def predict(self, hardware: Hardware, model: ModelShape, work: Work) -> Prediction:
        """What it would take (see `System`)."""
        only(work, self.name, ("run", "batch"))
        device(hardware, self.name)
        chosen = options(work, FlexGenOptions, self.name)
        if chosen.gpu_batch < 0 or chosen.batches < 1 or min(chosen.inner, chosen.gpus) < 0:
            raise absurd(self.name, "batch", work.policy, "gpu_batch, inner and gpus from 0, batches from 1")
        notes = list(model.notes)
        if chosen.percent is None:
            block = search(hardware, model, work, chosen)
            notes.append("policy found by search, as none was given")
        else:
            block = self._given(hardware, model, work, chosen, chosen.percent)
            if not fits(block, work):
                notes.append("by FlexGen's own formulas this policy does not fit")
        if block.disk_share(0) or block.disk_share(2):
            drives(hardware, self.name)
        percent = " ".join(f"{each:g}" for each in block.percent)
        notes.append(f"percent {percent}, {block.batches} micro-batches of {block.gpu_batch}")
        return self._generate(block, work, notes)

    def _given(
        self,
        hardware: Hardware,
        model: ModelShape,
        work: Work,
        chosen: FlexGenOptions,
        percent: tuple[float, float, float, float, float, float],
    ) -> Block:
        for first in (0, 2, 4):
            pair = percent[first], percent[first + 1]
            if min(pair) < 0 or sum(pair) > 100:
                raise absurd(self.name, "percent", percent, "three pairs of shares, none above 100 together")
        return Block(
            hardware=hardware,
            model=model,
            percent=percent,
            gpu_batch=chosen.gpu_batch or work.batch,
            batches=chosen.batches,
            chosen=chosen,
        )

    def _generate(self, block: Block, work: Work, notes: list[str]) -> Prediction:
        hardware, model, costs = block.hardware, block.model, block.costs
        stages = block.stages
        inner = block.chosen.inner or stages
        depth = -(-model.depth // stages)

        def stage(queries: int, context: float) -> Pass:
            head = block.batches * costs.head(block.gpu_batch * queries) / stages
            layers = block.forward(depth, queries, context)
            sent = 0.0
            if hardware.machines > 1 and hardware.network:
                hidden = block.gpu_batch * block.batches * queries * model.hidden * max(model.itemsize, 2)
                sent = hidden / hardware.network
            return Pass.chain((layers, Pass.serial(gpu=head, network=sent)))

        prefill = stage(work.prompt, work.prompt)
        decode = stage(1, work.prompt + work.generate / 2)
        if stages > 1:
            notes = [*notes, f"{stages} stages with {inner} batches under way; weights are loaded for each of them"]
        return generated(
            "flexgen",
            work,
            prefill.times(inner + stages - 1),
            decode.times(max(inner, stages)),
            notes,
            sequences=inner * block.gpu_batch * block.batches,
        )
