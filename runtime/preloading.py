"""A built module's parameters on their way to where they will live: into arenas, or into scratch files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..memory.arena import HostArena, round_up
from ..memory.disk import DiskEngine
from ..memory.image import Image
from ..memory.layout import FileSpan
from .backing import ModuleBacking
from .binding import placeholder
from .devices.base import Device
from .layout import Draft, Layout
from .places import Places


@dataclass(frozen=True, kw_only=True)
class Preload:
    """Moves them. The originals are freed on the way."""

    device: Device
    layout: Layout
    places: Places
    backing: ModuleBacking
    parameters: Mapping[str, nn.Parameter]
    engine: DiskEngine
    trains: bool
    """Whether weights in blocks change: then none has its only copy on a device apart."""

    def images(self) -> dict[int, Image]:
        """Host images by block. What goes to a scratch file gets its place there."""
        return {
            block.id: block.image if self._stays(block) else self.backing.place(block.image)
            for block in self.layout.blocks
        }

    def run(self, images: Mapping[int, Image]) -> None:
        """Move all parameters.

        What goes to disk is written first, while the originals are still there: if that fails, the module is as it
        was. Then each original is freed as soon as its last piece has been copied.
        """
        for name in self.layout.tables:
            self._write_table(name, self.backing.place_table(name))
        stays = [block for block in self.layout.blocks if self._stays(block)]
        for block in self.layout.blocks:
            if block not in stays:
                self._write_block(block, images[block.id])
        left = Counter(portion.name for block in stays for portion in block.portions)
        for name in self.parameters:
            if not left[name] and self.backing.holds(name):
                self._free(name)
        for block in stays:
            self._keep_block(block)
            for portion in block.portions:
                left[portion.name] -= 1
                if not left[portion.name]:
                    self._free(portion.name)

    def _stays(self, block: Draft) -> bool:
        """Whether its only copy is in an arena."""
        back = self.places.back
        on_device = block.id in self.places.front.permanent and not (self.trains and back is not None)
        return on_device or (back is not None and block.id in back.permanent)

    def _free(self, name: str) -> None:
        parameter = self.parameters[name]
        parameter.data = placeholder(parameter, self.device.torch_device)

    def _write_block(self, block: Draft, image: Image) -> None:
        (window,) = image.windows
        host, back = self.places.host, self.places.back
        if self.layout.is_expert(block) and back is None:
            offset = host.nbytes - round_up(window.nbytes)  # where slots of experts will be, which come last
        else:
            offset = (back or self.places.front).free[0].offset
        self._fill(offset, block)
        self.engine.write(window.path, window.file_offset, host.view(offset, window.nbytes)).wait()

    def _keep_block(self, block: Draft) -> None:
        host, front, back = self.places.host, self.places.front, self.places.back
        if back is None:
            self._fill(front.preload(block.id).offset, block)
        elif block.id in back.permanent:
            self._fill(back.preload(block.id).offset, block)
        else:
            passing = back.free[0]
            self._fill(passing.offset, block)
            slot = front.preload(block.id)
            assert block.device_image is not None
            for start, offset, nbytes in block.device_image.parts(0, block.image.nbytes):
                self.device.copy(host, passing.offset + start, slot.arena, slot.offset + offset, nbytes)
            self.device.wait(self.device.copied())

    def _fill(self, offset: int, block: Draft) -> None:
        """Put a block into host memory at an offset."""
        host = self.places.host
        for portion in block.portions:
            value = self.backing.value(portion)
            place = block.image.places[portion.key]
            if place.nbytes:
                torch.frombuffer(host.view(offset + place.offset, place.nbytes), dtype=torch.uint8).copy_(value)

    def _write_table(self, name: str, span: FileSpan) -> None:
        """Write a table to its scratch file through a small aligned buffer."""
        parameter = self.parameters[name]
        row = parameter.nbytes // parameter.shape[0]
        staging = HostArena(max(1 << 20, row + 4096), tier="staging")
        try:
            raw = torch.as_strided(parameter.detach().contiguous(), (parameter.numel(),), (1,)).cpu().view(torch.uint8)
            for start in range(0, parameter.nbytes, staging.nbytes):
                piece = raw[start : start + staging.nbytes]
                torch.frombuffer(staging.view(0, len(piece)), dtype=torch.uint8).copy_(piece)
                padded = -(-len(piece) // 4096) * 4096
                self.engine.write(span.path, span.offset + start, staging.view(0, padded)).wait()
        finally:
            staging.close()
